/** Products of integer matrices, exact sums rounded once to float32. */

const HALF = 2 ** 26;

/**
 * `left` (rows x rank) times `right` (rank x columns), Int32Arrays: a Float32Array.
 *
 * Zeros on the left, of which there are many, cost nothing. Where sums are below 2^25, a double
 * holds two of them: half as many multiplications, each exact.
 */
export function multiply(left, right, rows, rank, columns) {
  const out = new Float32Array(rows * columns);
  if (out.length === 0 || rank === 0) return out;
  const paired = bound(left, right, rank, columns) < HALF / 2;
  const width = paired ? (columns + 1) >> 1 : columns;
  const factor = new Float64Array(rank * width);
  for (let k = 0; k < rank; k++) {
    for (let j = 0; j < columns; j++) {
      const value = right[k * columns + j];
      if (j < width) factor[k * width + j] += value;
      else factor[k * width + j - width] += value * HALF;
    }
  }
  const sums = new Float64Array(width);
  for (let row = 0; row < rows; row++) {
    sums.fill(0);
    addRow(sums, left, row * rank, rank, factor, width);
    const at = row * columns;
    if (!paired) {
      for (let j = 0; j < columns; j++) out[at + j] = sums[j] + 0;
      continue;
    }
    for (let j = 0; j < width; j++) {
      const high = Math.round(sums[j] / HALF);
      out[at + j] = sums[j] - high * HALF;
      if (j + width < columns) out[at + j + width] = high + 0;
    }
  }
  return out;
}

/** What no sum exceeds. */
function bound(left, right, rank, columns) {
  let most = 0;
  for (let i = 0; i < left.length; i++) most = Math.max(most, Math.abs(left[i]));
  const sums = new Float64Array(columns);
  for (let i = 0; i < rank * columns; i++) sums[i % columns] += Math.abs(right[i]);
  return most * sums.reduce((a, b) => Math.max(a, b), 0);
}

/** Adds a row of the left times the factor, four of its numbers that are not 0 at a time. */
function addRow(sums, left, from, rank, factor, width) {
  const places = [0, 0, 0, 0];
  let found = 0;
  for (let k = 0; k < rank; k++) {
    if (left[from + k] === 0) continue;
    places[found++] = k;
    if (found < 4) continue;
    found = 0;
    const [a, b, c, d] = places;
    const [u, v, w, x] = [left[from + a], left[from + b], left[from + c], left[from + d]];
    const [p, q, r, s] = [a * width, b * width, c * width, d * width];
    for (let j = 0; j < width; j++) {
      sums[j] += u * factor[p + j] + v * factor[q + j] + w * factor[r + j] + x * factor[s + j];
    }
  }
  for (let i = 0; i < found; i++) {
    const value = left[from + places[i]];
    const p = places[i] * width;
    for (let j = 0; j < width; j++) sums[j] += value * factor[p + j];
  }
}
