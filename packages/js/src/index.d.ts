/** The types that a tensor may have. */
export type DType =
  | "float64" | "float32" | "float16" | "bfloat16" | "float8_e4m3fn" | "float8_e5m2"
  | "complex64" | "complex128" | "int64" | "int32" | "int16" | "int8"
  | "uint8" | "uint16" | "uint32" | "uint64" | "bool";

/** The array that holds a tensor's numbers, in row-major order. */
export type Numbers =
  | Float64Array | Float32Array | Int32Array | Int16Array | Int8Array | Uint8Array
  | Uint16Array | Uint32Array | BigInt64Array | BigUint64Array;

export type Json = null | boolean | number | string | Json[] | { [key: string]: Json };

/** What the index says of a tensor. */
export interface TensorInfo {
  readonly dtype: DType;
  readonly shape: readonly number[];
  /** The name of its format, such as `affine`. */
  readonly format: string;
  /** Bytes of its payloads in the file. */
  readonly storedBytes: number;
}

export interface Tensor {
  readonly dtype: DType;
  readonly shape: readonly number[];
  /**
   * Its numbers. `float16` and `bfloat16` are a Uint16Array of their bits, `float8_*` a Uint8Array;
   * complex numbers are pairs in a Float32Array or Float64Array; `bool` is a Uint8Array of 0 and 1.
   */
  readonly data: Numbers;
}

export interface Options {
  /**
   * Most bytes that decoding one tensor may take, at 16 for each of its values and of the codes and
   * numbers of its parts; by default 4 GiB or 256 times the file, whichever is more.
   */
  maxBytes?: number;
}

/** A file: opening it reads the index only, a tensor is decoded when it is read. */
export class Archive {
  /**
   * @param data the whole file; it is not copied and must not be changed while the archive is used.
   * @throws DecodeError the file is damaged, or is none of this version.
   */
  constructor(data: Uint8Array | ArrayBuffer, options?: Options);
  /** Tensors by name, in the order of the file. */
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /** Further names of tensors (tied weights). */
  readonly aliases: ReadonlyMap<string, string>;
  /** The user's own values. */
  readonly metadata: { readonly [key: string]: Json };
  /** Activation encodings by site. */
  readonly sites: { readonly [key: string]: Json };
  /** Names of tensors, then of aliases. */
  names(): string[];
  /**
   * Check and decode one tensor.
   * @throws DecodeError it is damaged.
   * @throws LimitError it would take more than `maxBytes`.
   * @throws RangeError there is no tensor of this name.
   */
  read(name: string): Tensor;
  /** The same as float32; only for floating-point tensors. */
  readFloat32(name: string): Float32Array;
}

/** The file is damaged, or is none of this version. */
export class DecodeError extends Error {}
/** Reading would take more memory or time than `maxBytes` allows. */
export class LimitError extends DecodeError {}
