/**
 * How the numbers of a tensor are rebuilt from its parts. A product of two float32 numbers is exact
 * in JavaScript's doubles, and a sum of two needs no more than they have to be rounded right: one
 * `Math.fround`, or a Float32Array, after each operation computes in single precision.
 */

import { must } from "./errors.js";
import { multiply } from "./factors.js";
import { COMPLEX, FLOATING, restore, toArray, toNumbers } from "./numbers.js";

const product = (shape) => shape.reduce((a, b) => a * b, 1);

/** Rows and columns of a tensor. */
export function rowsAndColumns(shape) {
  return shape.length > 1 ? [shape[0], product(shape.slice(1))] : [1, product(shape)];
}

/** An axis counted from 0, or null. */
function axisOf({ axis }, shape) {
  if (axis === null) return null;
  must(axis >= -shape.length && axis < shape.length, "setting axis");
  return axis < 0 ? axis + shape.length : axis;
}

/** Calls `run(start, end, index)` for stretches of `count` values, each of `length` or less. */
function eachStretch(count, length, run) {
  for (let start = 0, index = 0; start < count; start += length, index++) {
    run(start, Math.min(start + length, count), index);
  }
}

function raw({ dtype }, parts, type, shape) {
  const stored = dtype ?? type;
  const array = toArray(parts.take("values", shape, stored), stored);
  if (stored === type) return array;
  if (COMPLEX.includes(type)) {
    must(COMPLEX.includes(stored), "stored type");
    return restore(array, type === "complex128" ? "float64" : "float32");
  }
  must(FLOATING.includes(type) && FLOATING.includes(stored), "stored type");
  return restore(toNumbers(array, stored), type, false);
}

/** Of an affine tensor: how many scales there are, and which values share one. */
function grouping(settings, shape) {
  const axis = axisOf(settings, shape);
  const count = product(shape);
  const [rows, columns] = rowsAndColumns(shape);
  if (settings.group !== null) {
    const inRow = Math.ceil(columns / settings.group);
    const each = (run) => {
      eachStretch(count, columns, (begin, _, row) => {
        eachStretch(columns, settings.group, (start, end, index) => {
          run(begin + start, begin + end, row * inRow + index);
        });
      });
    };
    return { scales: rows * inRow, each };
  }
  if (axis === null) return { scales: 1, each: (run) => run(0, count, 0) };
  const inner = product(shape.slice(axis + 1));
  const each = (run) => {
    if (count) eachStretch(count, inner, (start, end, index) => run(start, end, index % shape[axis]));
  };
  return { scales: shape[axis], each };
}

function affine(settings, parts, _, shape) {
  const { bits, grid, scale_dtype: type } = settings;
  const { scales, each } = grouping(settings, shape);
  const levels = parts.codes("levels", shape, bits === null ? null : 2 ** bits);
  const scale = parts.singles("scale", [scales], type);
  const out = new Float32Array(levels.length);
  if (grid === "endpoint") {
    const offset = parts.singles("offset", [scales], type);
    each((start, end, index) => {
      const [s, o] = [scale[index], offset[index]];
      for (let i = start; i < end; i++) out[i] = Math.fround(levels[i] * s) + o;
    });
    return out;
  }
  const asymmetric = bits !== null && grid === "asymmetric";
  const zeros = asymmetric ? parts.codes("zero", [scales], 2 ** bits) : null;
  const zero = bits === null ? parts.codes("zero", [1], 2 ** 24)[0] : 2 ** (bits - 1);
  each((start, end, index) => {
    const s = scale[index];
    if (bits === 1 && !asymmetric) {
      for (let i = start; i < end; i++) out[i] = (2 * levels[i] - 1) * s;
      return;
    }
    const z = zeros ? zeros[index] : zero;
    for (let i = start; i < end; i++) out[i] = (levels[i] - z) * s;
  });
  return out;
}

function codebook(settings, parts, _, shape) {
  const { bucket, scale_dtype: type } = settings;
  const count = product(shape);
  const [size] = parts.shape("points", 1);
  must(size >= 1 && size <= settings.points, "number of points");
  const points = parts.singles("points", [size], settings.dtype);
  const indices = parts.codes("indices", shape, size);
  const out = Float32Array.from(indices, (index) => points[index]);
  if (bucket === null) return out;
  const buckets = [Math.ceil(count / bucket)];
  const scale = parts.singles("scale", buckets, type);
  const offset = settings.shift ? parts.singles("offset", buckets, type) : null;
  eachStretch(count, bucket, (start, end, index) => {
    for (let i = start; i < end; i++) {
      out[i] *= scale[index];
      if (offset) out[i] += offset[index];
    }
  });
  return out;
}

function productCode(settings, parts, _, shape) {
  const { block } = settings;
  const [rows, columns] = rowsAndColumns(shape);
  const [size] = parts.shape("centroids", 2);
  must(size >= 1 && size <= settings.points, "number of centroids");
  let centroids;
  if (settings.dtype === "int8") {
    const codes = parts.codes("centroids", [size, block], 256);
    const [scale] = parts.singles("scale", [1], "float32");
    centroids = Float32Array.from(codes, (code) => (code - 128) * scale);
  } else centroids = parts.singles("centroids", [size, block], settings.dtype);
  const blocks = Math.ceil(columns / block);
  const indices = parts.codes("indices", [rows, blocks], size);
  const out = new Float32Array(product(shape));
  let at = 0;
  for (let i = 0; at < out.length; i++) {
    const width = (i + 1) % blocks ? block : columns - (blocks - 1) * block;
    const from = indices[i] * block;
    for (let j = 0; j < width; j++) out[at++] = centroids[from + j];
  }
  return out;
}

function mixed({ group, grid }, parts, _, shape) {
  const count = product(shape);
  const widths = parts.codes("bits", [Math.ceil(count / group)], 17);
  const counts = new Array(17).fill(0);
  eachStretch(count, group, (start, end, index) => {
    counts[widths[index]] += end - start;
  });
  const endpoint = grid === "endpoint";
  const low = endpoint ? parts.singles("low", [1], "float32")[0] : 0;
  const span = endpoint
    ? parts.singles("high", [1], "float32")[0] - low
    : 2 * parts.singles("range", [1], "float32")[0];
  const levels = counts.map((n, b) => (b && n ? parts.codes(`levels${b}`, [n], 2 ** b) : null));
  const used = new Array(17).fill(0);
  const out = new Float32Array(count);
  eachStretch(count, group, (start, end, index) => {
    const b = widths[index];
    if (b === 0) return;
    const step = Math.fround(b === 1 && !endpoint ? span / 4 : span / (2 ** b - 1));
    const of = levels[b];
    for (let i = start; i < end; i++) {
      const level = of[used[b]++];
      if (endpoint) out[i] = Math.fround(level * step) + low;
      else out[i] = (b > 1 ? level - 2 ** (b - 1) : 2 * level - 1) * step;
    }
  });
  return out;
}

const MACHINES = {
  4: [5, 2], 8: [11, 4], 16: [19, 4], 32: [37, 8], 64: [67, 20], 128: [157, 86], 256: [333, 242],
};

function trellis(settings, parts, _, shape) {
  const axis = axisOf(settings, shape);
  must(parts.alphabet("levels") <= 2 ** 23, "alphabet of levels");
  const levels = parts.codes("levels", [...shape.slice(1), ...shape.slice(0, 1)]);
  const [zero] = parts.codes("zero", [1], 2 ** 23);
  const scales = axis === null ? 1 : shape[axis];
  const scale = parts.singles("scale", [scales], settings.scale_dtype);
  const out = new Float32Array(levels.length);
  if (out.length === 0) return out;
  const [rows, columns] = rowsAndColumns(shape);
  const [a, b] = MACHINES[settings.states].map((polynomial) => polynomial >> 1);
  const ofRows = axis === 0 && shape.length > 1;
  const inner = axis === null ? 1 : product(shape.slice(axis + 1));
  const registers = new Uint8Array(rows);
  for (let column = 0, at = 0; column < columns; column++) {
    const index = axis === null || ofRows ? 0 : Math.floor(column / inner) % scales;
    for (let row = 0; row < rows; row++, at++) {
      const k = levels[at] - zero;
      const register = registers[row];
      const z = register & 1;
      out[row * columns + column] = Math.fround(2 * k + z) * scale[ofRows ? row : index];
      registers[row] = (register >> 1) ^ (-z & a) ^ (-(k & 1) & b);
    }
  }
  return out;
}

function factors(settings, parts, _, shape) {
  const [rows, columns] = rowsAndColumns(shape);
  const [rank] = parts.shape("right", 2);
  must(rank <= Math.min(rows, columns, 4096), "rank");
  const alphabets = [parts.alphabet("left"), parts.alphabet("right")];
  const left = parts.codes("left", [rows, rank]);
  const right = parts.codes("right", [rank, columns]);
  const zeros = parts.codes("zero", [2], 2 ** 24);
  const most = alphabets.map((alphabet, i) => Math.max(zeros[i], alphabet - 1 - zeros[i]));
  must(BigInt(most[0]) * BigInt(most[1]) * BigInt(rank) < 2n ** 53n, "inexact sums");
  const scale = parts.singles("scale", [settings.axis === 0 ? rows : 1], settings.scale_dtype);
  for (let i = 0; i < right.length; i++) right[i] -= zeros[1];
  return multiply({ left, zero: zeros[0], right, rows, rank, columns, scale });
}

const DECODERS = { raw, affine, codebook, product: productCode, mixed, trellis, factors };

/** The array of a tensor, in its type, from its format and {@link Parts}. */
export function decodeTensor(settings, parts, type, shape) {
  const isRaw = settings.format === "raw";
  must(isRaw || FLOATING.includes(type), "a type that the format cannot hold");
  const values = DECODERS[settings.format](settings, parts, type, shape);
  parts.end();
  return isRaw || type === "float32" ? values : restore(values, type);
}
