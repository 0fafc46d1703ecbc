/** The formats that a file may name, and what their settings may be. */

import { must } from "./errors.js";
import { isInt, isObject } from "./json.js";
import { SIZES } from "./numbers.js";

const integer = (low, high) => (value) => isInt(value, low, high);
const oneOf = (...choices) => (value) => choices.includes(value);
const orNull = (check) => (value) => value === null || check(value);
const isType = (value) => typeof value === "string" && value in SIZES;

const COUNT = integer(1, 2 ** 24);
const AXIS = [null, orNull(integer(-64, 63))];
const SCALES = ["float32", "float16", "bfloat16"];
const SCALE = ["float32", oneOf(...SCALES)];

/** Of each format the default and the check of its settings; undefined defaults must be given. */
const SETTINGS = {
  __proto__: null,
  raw: { dtype: [null, orNull(isType)] },
  affine: {
    bits: [8, orNull(integer(1, 16))],
    axis: AXIS,
    group: [null, orNull(COUNT)],
    grid: ["symmetric", oneOf("symmetric", "asymmetric", "endpoint")],
    scale_dtype: SCALE,
  },
  codebook: {
    points: [undefined, integer(2, 65536)],
    bucket: [null, orNull(COUNT)],
    shift: [false, oneOf(false, true)],
    dtype: ["float16", oneOf(...SCALES)],
    scale_dtype: SCALE,
  },
  product: {
    block: [undefined, COUNT],
    points: [256, integer(2, 65536)],
    dtype: ["float16", oneOf(...SCALES, "int8")],
  },
  mixed: { group: [8, COUNT], grid: ["endpoint", oneOf("endpoint", "symmetric")] },
  trellis: { states: [8, oneOf(4, 8, 16, 32, 64, 128, 256)], axis: AXIS, scale_dtype: SCALE },
  factors: { axis: [null, orNull(integer(0, 0))], scale_dtype: SCALE },
};

/** A format of the index, with all of its settings. */
export function readFormat(given) {
  must(isObject(given), "format");
  const { format, version, ...rest } = given;
  const known = typeof format === "string" ? SETTINGS[format] : undefined;
  must(known && version === 1, "unknown format");
  const settings = { format };
  for (const [name, [value, check]] of Object.entries(known)) {
    settings[name] = name in rest ? rest[name] : value;
    must(check(settings[name]), `setting ${name} of format ${format}`);
  }
  for (const name of Object.keys(rest)) must(Object.hasOwn(known, name), "unknown setting");
  if (format === "affine") {
    must(settings.axis === null || settings.group === null, "both axis and group");
    must(settings.bits !== null || settings.grid === "symmetric", "grid");
  }
  if (format === "codebook") must(settings.bucket !== null || !settings.shift, "shift");
  return settings;
}
