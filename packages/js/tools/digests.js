import { createHash } from "node:crypto";

/** The bytes of an array. */
export function bytesOf({ buffer, byteOffset, byteLength }) {
  return new Uint8Array(buffer, byteOffset, byteLength);
}

/** SHA-256 of a tensor's type, shape and bytes. */
export function digest({ dtype, shape, data }) {
  const head = `${dtype} ${shape.join("x")}\n`;
  return createHash("sha256").update(head).update(bytesOf(data)).digest("hex");
}

const SMALL = { float16: 0x7c00, bfloat16: 0x7f80, float8_e5m2: 0x7c, float8_e4m3fn: 0x7e };

/** A copy where every NaN of a floating-point or complex tensor is all ones. */
export function withOneNaN(tensor) {
  const data = tensor.data.slice();
  const bytes = bytesOf(data);
  const above = SMALL[tensor.dtype];
  const isFloat = data instanceof Float32Array || data instanceof Float64Array;
  for (let i = 0; i < data.length; i++) {
    const size = data.BYTES_PER_ELEMENT;
    const isNaN = above ? (data[i] & (2 ** (8 * size - 1) - 1)) > above : Number.isNaN(data[i]);
    if ((isFloat || above) && isNaN) bytes.fill(255, i * size, (i + 1) * size);
  }
  return { ...tensor, data };
}
