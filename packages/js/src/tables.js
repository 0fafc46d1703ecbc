import { width } from "./bits.js";
import { must } from "./errors.js";

const E = [
  4096, 4277, 4466, 4664, 4870, 5086, 5311, 5547, 5792, 6049, 6316, 6596, 6888, 7193, 7512, 7844,
];
const F = [
  32768, 33124, 33485, 33850, 34218, 34591, 34968, 35348, 35733, 36122, 36516, 36913, 37315, 37722,
  38132, 38548, 38967, 39392, 39821, 40254, 40693, 41136, 41584, 42037, 42494, 42957, 43425, 43898,
  44376, 44859, 45347, 45841, 46340, 46845, 47355, 47871, 48392, 48919, 49452, 49990, 50535, 51085,
  51641, 52204, 52772, 53347, 53928, 54515, 55108, 55709, 56315, 56928, 57548, 58175, 58809, 59449,
  60096, 60751, 61412, 62081, 62757, 63440, 64131, 64830,
];

/**
 * The symbols of one table that occur, by rank, and their levels.
 *
 * @returns {{symbols: number[], levels: number[]}}
 */
export function readTable(head, size, escaped, precision) {
  const kind = head.u(2);
  const count = size + (escaped ? 1 : 0);
  if (kind < 2) return readSteps(head, count, kind === 1, 1 << precision);
  must(size <= 4096 && count <= 1 << precision, "curve too wide");
  return readCurve(head, size, escaped, kind === 3);
}

function readSteps(head, count, gapped, most) {
  const r = head.u(3);
  const g = head.u(2);
  const k = head.u(3);
  must(r <= 4 && g <= 2, "settings of a table");
  const limit = 16 * 2 ** r - 1;
  let symbol = gapped ? head.gamma() - 1 : 0;
  must(symbol < count, "table without symbols");
  let v1 = head.u(4 + r);
  let v2 = v1;
  const symbols = [symbol++];
  const levels = [v1 << (4 - r)];
  while (symbol < count) {
    let z = head.rice(k);
    if (gapped && z === 0) {
      symbol += head.gamma();
      must(symbol <= count, "run beyond the table");
      if (symbol === count) break;
      z = head.rice(k);
    } else if (gapped) z--;
    const prediction = Math.min(Math.max(v1 + (((v1 - v2) * g) >> 1), 0), limit);
    const value = prediction + (z % 2 ? -(z + 1) / 2 : z / 2);
    must(value >= 0 && value <= limit, "value of a table");
    v2 = v1;
    v1 = value;
    symbols.push(symbol++);
    levels.push(value << (4 - r));
    must(symbols.length <= most, "too many symbols");
  }
  return { symbols, levels };
}

/** floor(64 log2(d)) for d from 1 to 2^14; it is exact, for only powers of 2 come near a whole. */
export function octaves(d) {
  const whole = 31 - Math.clz32(d);
  return d === 1 << whole ? 64 * whole : Math.floor(64 * Math.log2(d));
}

function readCurve(head, size, escaped, spiked) {
  const c = head.u(width(4 * size - 3));
  must(c <= 4 * (size - 1), "centre");
  const s = head.u(7);
  const b = [2, 3, 4, 5, 6, 7, 8, 10][head.u(3)];
  const t = spiked ? head.u(6) - 32 : 0;
  const symbols = [];
  const levels = [];
  for (let x = 0; x < size; x++) {
    const d = Math.abs(4 * x - c);
    let drop = 0;
    if (d > 0) {
      const y = (b * (octaves(d) - 8 * s)) >> 2;
      const o = Math.min(Math.max(y >> 6, -16), 4);
      drop = (F[y & 63] << 4) >> (15 - o);
    }
    symbols.push(x);
    levels.push(Math.max(255 - Math.min(drop, 255) - Math.max(4 * t, 0), 0));
  }
  if (spiked) levels[(c + 2) >> 2] = 255 + Math.min(4 * t, 0);
  if (escaped) {
    symbols.push(size);
    levels.push(head.u(8));
  }
  return { symbols, levels };
}

/** Frequencies, of the sum 2^precision. All numbers stay below 2^53: no result is rounded. */
export function frequencies(levels, precision) {
  const total = 2 ** precision;
  const weights = levels.map((level) => E[level & 15] * 2 ** (level >> 4));
  const weight = weights.reduce((sum, w) => sum + w, 0);
  let f = weights.map((w) => Math.max(Math.floor((w * total) / weight), 1));
  let sum = f.reduce((a, b) => a + b, 0);
  if (sum > total) {
    const excess = sum - f.length;
    f = f.map((x) => 1 + Math.floor(((x - 1) * (total - f.length)) / excess));
    sum = f.reduce((a, b) => a + b, 0);
  }
  if (sum < total) {
    const gains = weights.map((w, i) => Math.floor((w * 2 ** 17) / (2 * f[i] + 1)));
    const order = gains.map((_, i) => i).sort((i, j) => gains[j] - gains[i] || i - j);
    for (let i = 0; i < total - sum; i++) f[order[i]]++;
  }
  return f;
}
