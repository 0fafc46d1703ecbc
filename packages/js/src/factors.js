/** Products of integer matrices, exact sums rounded once to float32, times scales. */

const HALF = 2 ** 26;

/**
 * `left - zero` (rows x rank) times `right` (rank x columns), Int32Arrays, and each row times its
 * own, or the only, of `scale`: a Float32Array.
 *
 * Zeros on the left, of which there are many, cost nothing. Where sums are below 2^25, a double
 * holds two of them: half as many multiplications, each exact.
 */
export function multiply({ left, zero, right, rows, rank, columns, scale }) {
  const out = new Float32Array(rows * columns);
  if (out.length === 0) return out;
  const paired = bound(left, zero, right, columns) < HALF / 2;
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
  const places = new Int32Array(rank);
  for (let row = 0; row < rows; row++) {
    sums.fill(0);
    addRow(sums, left, zero, row * rank, rank, factor, places);
    finish(out, row * columns, sums, columns, paired, scale[scale.length === 1 ? 0 : row]);
  }
  return out;
}

/** What no sum exceeds. */
function bound(left, zero, right, columns) {
  let least = zero;
  let greatest = zero;
  for (let i = 0; i < left.length; i++) {
    const value = left[i];
    if (value < least) least = value;
    if (value > greatest) greatest = value;
  }
  const sums = new Float64Array(columns);
  for (let i = 0; i < right.length; i++) sums[i % columns] += Math.abs(right[i]);
  return Math.max(zero - least, greatest - zero) * sums.reduce((a, b) => Math.max(a, b), 0);
}

/** Adds a row of the left times the factor, four of its numbers that are not 0 at a time. */
function addRow(sums, left, zero, from, rank, factor, places) {
  const width = sums.length;
  let found = 0;
  for (let k = 0; k < rank; k++) {
    places[found] = k;
    if (left[from + k] !== zero) found++;
  }
  let i = 0;
  for (; i + 3 < found; i += 4) {
    const a = places[i];
    const b = places[i + 1];
    const c = places[i + 2];
    const d = places[i + 3];
    const u = left[from + a] - zero;
    const v = left[from + b] - zero;
    const w = left[from + c] - zero;
    const x = left[from + d] - zero;
    const p = a * width;
    const q = b * width;
    const r = c * width;
    const s = d * width;
    for (let j = 0; j < width; j++) {
      sums[j] += u * factor[p + j] + v * factor[q + j] + w * factor[r + j] + x * factor[s + j];
    }
  }
  for (; i < found; i++) {
    const value = left[from + places[i]] - zero;
    const p = places[i] * width;
    for (let j = 0; j < width; j++) sums[j] += value * factor[p + j];
  }
}

/** Sums, or pairs of them, as float32 times the scale; a sum of 0 is 0 and not -0. */
function finish(out, at, sums, columns, paired, scale) {
  const width = sums.length;
  if (!paired) {
    for (let j = 0; j < columns; j++) out[at + j] = Math.fround(sums[j] + 0) * scale;
    return;
  }
  const above = columns - width;
  for (let j = 0; j < width; j++) {
    const high = Math.floor(sums[j] / HALF + 0.5);
    out[at + j] = Math.fround(sums[j] - high * HALF) * scale;
    if (j < above) out[at + j + width] = Math.fround(high + 0) * scale;
  }
}
