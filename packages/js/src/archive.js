import { crc32 } from "./checksum.js";
import { DecodeError, LimitError, must } from "./errors.js";
import { decodeTensor, rowsAndColumns } from "./formats.js";
import { inflate } from "./inflate.js";
import { isInt, isObject, parse, plain } from "./json.js";
import { FLOATING, SIZES, toNumbers } from "./numbers.js";
import { Parts } from "./parts.js";
import { decodeBits, decodePlanes, decodeRans } from "./rans.js";
import { readFormat } from "./settings.js";

const MAGIC = [0x8d, 0x44, 0x49, 0x54, 0x48, 0x45, 0x52, 0x1a, 1, 0, 0, 0];
const END = [0x68, 0x74, 0x69, 0x64];
const MOST = 2 ** 46;
const TENSOR_COLUMNS = ["name", "format", "dtype", "shape", "parts"];
const PART_COLUMNS = ["name", "codec", "shape", "holds", "data"];

const product = (shape) => shape.reduce((a, b) => a * b, 1);
const isType = (value) => typeof value === "string" && value in SIZES;

/** A `.dither` file; see `index.d.ts`. */
export class Archive {
  #parts = new Map();
  #maxBytes;

  constructor(data, { maxBytes } = {}) {
    const file = data instanceof ArrayBuffer ? new Uint8Array(data) : data;
    if (!(file instanceof Uint8Array)) {
      throw new TypeError("Archive(data): give the file's bytes, a Uint8Array or an ArrayBuffer");
    }
    this.#maxBytes = maxBytes ?? Math.max(2 ** 32, 256 * file.length);
    const { index, end } = readIndex(file);
    this.tensors = new Map();
    const formats = index.formats.map(readFormat);
    const parts = rowsOf(index.parts, PART_COLUMNS, "crc");
    const cursor = { file, end, at: 12, crcs: index.parts.crc, usedCrcs: 0, usedParts: 0 };
    for (const row of rowsOf(index.tensors, TENSOR_COLUMNS)) this.#add(row, formats, parts, cursor);
    must(cursor.usedParts === parts.length, "parts of no tensor");
    must(cursor.usedCrcs === index.parts.crc.length, "checksums of no part");
    must(cursor.at === end, "payloads and index");
    this.aliases = new Map(Object.entries(index.aliases ?? {}));
    for (const [alias, name] of this.aliases) {
      must(this.tensors.has(name) && !this.tensors.has(alias), "alias");
    }
    this.metadata = plain(index.metadata ?? {});
    this.sites = plain(index.sites ?? {});
  }

  #add(row, formats, parts, cursor) {
    const { name, dtype } = row;
    must(typeof name === "string" && !this.tensors.has(name), "name of a tensor");
    must(isInt(row.format, 0, formats.length - 1), "position of a format");
    must(isType(dtype), "type of a tensor");
    must(isInt(row.parts, 0, 64), "number of parts");
    const shape = readShape(row.shape);
    const own = new Map();
    for (let i = 0; i < row.parts; i++) {
      must(cursor.usedParts < parts.length, "number of parts");
      const part = readPart(parts[cursor.usedParts++], shape, cursor);
      must(!own.has(part.name), "name of a part");
      own.set(part.name, part);
    }
    const settings = formats[row.format];
    const storedBytes = [...own.values()].reduce((sum, part) => sum + part.payload.length, 0);
    this.#parts.set(name, { parts: own, settings });
    this.tensors.set(name, { dtype, shape, format: settings.format, storedBytes });
  }

  names() {
    return [...this.tensors.keys(), ...this.aliases.keys()];
  }

  read(name) {
    const target = this.aliases.get(name) ?? name;
    const tensor = this.tensors.get(target);
    if (!tensor) throw new RangeError(`the file has no tensor ${JSON.stringify(name)}`);
    const { dtype, shape } = tensor;
    const { parts, settings } = this.#parts.get(target);
    this.#checkLimit(shape, parts, settings);
    try {
      const decoded = new Map();
      for (const [part, row] of parts) decoded.set(part, decodePart(row));
      const data = decodeTensor(settings, new Parts(decoded), dtype, shape);
      return { dtype, shape, data };
    } catch (error) {
      if (!(error instanceof DecodeError)) throw error;
      throw new DecodeError(`tensor ${JSON.stringify(name)}: ${error.message}`);
    }
  }

  readFloat32(name) {
    const { dtype, data } = this.read(name);
    if (!FLOATING.includes(dtype)) throw new TypeError(`readFloat32: ${name} is of type ${dtype}`);
    const numbers = toNumbers(data, dtype);
    return numbers instanceof Float32Array ? numbers : Float32Array.from(numbers);
  }

  #checkLimit(shape, parts, settings) {
    let count = product(shape);
    for (const part of parts.values()) count += product(part.shape);
    const right = settings.format === "factors" ? parts.get("right") : undefined;
    const products = right ? product(right.shape) * rowsAndColumns(shape)[0] : 0;
    if (16 * count > this.#maxBytes || products > 128 * this.#maxBytes) {
      throw new LimitError(
        `a tensor of shape ${shape} takes ${16 * count} bytes and ${products} products; if you ` +
          `trust the file, give more than maxBytes=${this.#maxBytes}`,
      );
    }
  }
}

/** The index, as JSON, and where it begins in the file. */
function readIndex(file) {
  const size = file.length;
  must(size >= 28 && MAGIC.slice(0, 8).every((byte, i) => file[i] === byte), "no .dither file");
  const onBase = file[8] === 1 && file[9] === 0 && file[10] === 1 && file[11] === 0;
  must(!onBase, "differences to a base, which this decoder does not read");
  must(MAGIC.every((byte, i) => file[i] === byte), "version or features");
  must(END.every((byte, i) => file[size - 4 + i] === byte), "end mark: the file is cut off");
  const view = new DataView(file.buffer, file.byteOffset, size);
  const [packed, unpacked, crc] = [16, 12, 8].map((back) => view.getUint32(size - back, true));
  const begin = size - 16 - packed;
  must(begin >= 12 && unpacked <= 2 ** 28, "lengths of the index");
  if (unpacked > 2 ** 20 + 64 * size) throw new LimitError("index out of proportion");
  must(crc32(file.subarray(0, 12), file.subarray(begin, size - 8)) === crc, "CRC of the index");
  const index = parse(utf8(inflate(file.subarray(begin, size - 16), unpacked)));
  must(isObject(index), "index");
  for (const name of ["formats", "tensors", "parts"]) must(name in index, "fields of the index");
  const optional = ["aliases", "metadata", "sites"];
  const known = ["formats", "tensors", "parts", "base", ...optional];
  must(Object.keys(index).every((name) => known.includes(name)), "unknown field");
  must(Array.isArray(index.formats), "formats");
  for (const name of optional) must(!(name in index) || isObject(index[name]), name);
  must(Object.values(index.sites ?? {}).every(isObject), "site");
  must((index.base ?? null) === null, "reserved field");
  return { index, end: begin };
}

function utf8(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    must(false, "index: no UTF-8");
  }
}

/** An object of arrays as an array of objects. */
function rowsOf(table, names, shorter) {
  const all = shorter ? [...names, shorter] : names;
  must(isObject(table) && Object.keys(table).length === all.length, "columns");
  must(all.every((name) => Array.isArray(table[name])), "columns");
  const { length } = table[names[0]];
  must(names.every((name) => table[name].length === length), "lengths of columns");
  return Array.from({ length }, (_, i) =>
    Object.fromEntries(names.map((name) => [name, table[name][i]])),
  );
}

function readShape(value) {
  must(Array.isArray(value) && value.length <= 32, "shape");
  must(value.every((length) => isInt(length, 0, MOST)), "shape");
  value.reduce((all, length) => {
    must(all * (length || 1) <= MOST, "shape");
    return all * (length || 1);
  }, 1);
  return value.map((length) => length || 0); // -0 is 0
}

/** One part: its row of the index, checked, with its payload. */
function readPart({ name, codec, shape, holds, data }, tensorShape, cursor) {
  must(typeof name === "string" && typeof codec === "string", "name or codec of a part");
  const found = { name, codec, holds, crc: null };
  found.shape = shape === 0 ? tensorShape : readShape(shape);
  must(isType(holds) || isInt(holds, 1, 2 ** 24), "holds");
  if (typeof data === "string") {
    must(/^([0-9a-fA-F]{2})*$/.test(data) && !data.includes("\n"), "hexadecimal digits");
    found.payload = Uint8Array.from({ length: data.length / 2 }, (_, i) =>
      parseInt(data.slice(2 * i, 2 * i + 2), 16),
    );
    return found;
  }
  must(isInt(data, 0, cursor.end - cursor.at), "length of a payload");
  found.payload = cursor.file.subarray(cursor.at, cursor.at + data);
  found.crc = cursor.crcs[cursor.usedCrcs++];
  must(isInt(found.crc, 0, 2 ** 32 - 1), "CRC of a payload");
  cursor.at += data;
  return found;
}

/** Codes, an Int32Array, or the bytes of numbers. */
function decodePart({ codec, shape, holds, payload, crc }) {
  must(crc === null || crc32(payload) === crc, "CRC of a payload");
  const count = product(shape);
  if (typeof holds === "number") {
    must(codec === "bits" || codec === "rans", "codec of a part");
    const isCoded = codec === "rans";
    const values = isCoded
      ? decodeRans(payload, shape, holds)
      : decodeBits(payload, count, holds);
    return { shape, holds, values };
  }
  must(codec === "raw" || codec === "rans", "codec of a part");
  const size = SIZES[holds];
  const values = codec === "rans" ? decodePlanes(payload, count, size) : payload;
  must(values.length === count * size, "length of numbers");
  must(holds !== "bool" || values.every((byte) => byte <= 1), "neither true nor false");
  return { shape, holds, values };
}
