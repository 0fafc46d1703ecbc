/** Types of numbers: bytes in files, typed arrays, and rounding to the shorter floats. */

import { must } from "./errors.js";

must(new Uint8Array(new Uint16Array([1]).buffer)[0] === 1, "only little-endian machines");

export const SIZES = {
  __proto__: null,
  float64: 8, float32: 4, float16: 2, bfloat16: 2, float8_e4m3fn: 1, float8_e5m2: 1,
  complex64: 8, complex128: 16, int64: 8, int32: 4, int16: 2, int8: 1, uint8: 1,
  uint16: 2, uint32: 4, uint64: 8, bool: 1,
};

export const FLOATING = [
  "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
];
export const COMPLEX = ["complex64", "complex128"];

const ARRAYS = {
  float64: Float64Array, float32: Float32Array, float16: Uint16Array, bfloat16: Uint16Array,
  float8_e4m3fn: Uint8Array, float8_e5m2: Uint8Array, complex64: Float32Array,
  complex128: Float64Array, int64: BigInt64Array, int32: Int32Array, int16: Int16Array,
  int8: Int8Array, uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array,
  uint64: BigUint64Array, bool: Uint8Array,
};

/** The array of a type that holds these bytes, which are copied. */
export function toArray(bytes, type) {
  return new ARRAYS[type](new Uint8Array(bytes).buffer);
}

/** Bits of the exponent and of the fraction, and the largest finite value. */
const SMALL = {
  float16: [5, 10, 65504],
  bfloat16: [8, 7, 2 ** 127 * (2 - 2 ** -7)],
  float8_e4m3fn: [4, 3, 448],
  float8_e5m2: [5, 2, 57344],
};

const TABLES = new Map();

/** The numbers that all codes of a short type stand for. */
function tableOf(type) {
  if (TABLES.has(type)) return TABLES.get(type);
  const [exponentBits, fractionBits] = SMALL[type];
  const table = new Float32Array(1 << (1 + exponentBits + fractionBits));
  const half = table.length / 2;
  const bias = 2 ** (exponentBits - 1) - 1;
  const top = 2 ** exponentBits - 1;
  for (let code = 0; code < half; code++) {
    const exponent = code >> fractionBits;
    const fraction = (code & ((1 << fractionBits) - 1)) / 2 ** fractionBits;
    let value = ((exponent ? 1 : 0) + fraction) * 2 ** (Math.max(exponent, 1) - bias);
    if (type === "float8_e4m3fn") {
      if (code === half - 1) value = NaN;
    } else if (exponent === top) value = fraction ? NaN : Infinity;
    table[code] = value;
    table[code + half] = -value;
  }
  TABLES.set(type, table);
  return table;
}

/** The numbers of a floating type, exactly, from an array of its bits; long types as they are. */
export function toNumbers(array, type) {
  if (type === "float64" || type === "float32") return array;
  if (type === "bfloat16") {
    return new Float32Array(Uint32Array.from(array, (code) => code << 16).buffer);
  }
  const table = tableOf(type);
  return Float32Array.from(array, (code) => table[code]);
}

const DOUBLE = new Float64Array(1);
const WORDS = new Uint32Array(DOUBLE.buffer);

/** floor(log2(x)) of a finite normal double above 0. */
function exponentOf(x) {
  DOUBLE[0] = x;
  return (WORDS[1] >>> 20) - 1023;
}

function roundHalfToEven(x) {
  const below = Math.floor(x);
  const rest = x - below;
  return rest > 0.5 || (rest === 0.5 && below % 2 === 1) ? below + 1 : below;
}

/** Numbers in a floating type, rounded to nearest even: an array of its bits, or of floats. */
export function restore(values, type, clamp = true) {
  if (type === "float32") return Float32Array.from(values);
  if (type === "float64") return Float64Array.from(values);
  const [exponentBits, fractionBits, largest] = SMALL[type];
  const lowest = 2 - 2 ** (exponentBits - 1);
  const sign = 1 << (exponentBits + fractionBits);
  const saturates = clamp || type === "float8_e4m3fn"; // which has no infinities
  const infinity = ((1 << exponentBits) - 1) << fractionBits;
  const out = new ARRAYS[type](values.length);
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    const magnitude = Math.min(Math.abs(value), saturates ? largest : 2 * largest);
    let code = sign - 1;
    if (!Number.isNaN(value)) {
      const exponent = magnitude < 2 ** lowest ? lowest : exponentOf(magnitude);
      const steps = roundHalfToEven(magnitude * 2 ** (fractionBits - exponent));
      code = (exponent - lowest) * 2 ** fractionBits + steps;
      if (type !== "float8_e4m3fn") code = Math.min(code, infinity);
    }
    out[i] = value < 0 || Object.is(value, -0) ? code + sign : code;
  }
  return out;
}
