import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";
import { deflateSync } from "node:zlib";
import { Archive, DecodeError, LimitError } from "../src/index.js";
import { crc32 } from "../src/checksum.js";

const FOLDER = new URL("../../../fixtures/", import.meta.url);
const read = (name) => new Uint8Array(readFileSync(new URL(`${name}.dither`, FOLDER)));

/** A file of payloads and an index, or of its text. */
function closed(index, payloads = []) {
  const text = typeof index === "string" ? index : JSON.stringify(index);
  const head = [0x8d, 0x44, 0x49, 0x54, 0x48, 0x45, 0x52, 0x1a, 1, 0, 0, 0];
  const packed = deflateSync(Buffer.from(text));
  const tail = Buffer.alloc(16);
  tail.writeUInt32LE(packed.length, 0);
  tail.writeUInt32LE(Buffer.byteLength(text), 4);
  const crc = crc32(Uint8Array.from(head), packed, tail.subarray(0, 8));
  tail.writeUInt32LE(crc, 8);
  tail.write("htid", 12);
  return new Uint8Array(Buffer.concat([Buffer.from([...head, ...payloads]), packed, tail]));
}

/** The index of one float32 tensor `w`, (2, 2), as it is. */
function plain() {
  const payload = new Uint8Array(Float32Array.of(1, -2, 0.5, 3).buffer);
  const index = {
    formats: [{ format: "raw", version: 1 }],
    tensors: { name: ["w"], format: [0], dtype: ["float32"], shape: [[2, 2]], parts: [1] },
    parts: {
      name: ["values"], codec: ["raw"], shape: [0], holds: ["float32"], data: [16],
      crc: [crc32(payload)],
    },
    metadata: { of: { the: ["user", 1.5, 2, null] } },
  };
  return { index, payload };
}

test("a file as the page describes it", () => {
  const { index, payload } = plain();
  const archive = new Archive(closed(index, payload).buffer);
  assert.deepEqual(archive.names(), ["w"]);
  assert.equal(archive.tensors.get("w").storedBytes, 16);
  assert.deepEqual(archive.read("w").data, Float32Array.of(1, -2, 0.5, 3));
  assert.equal(JSON.stringify(archive.metadata), JSON.stringify(index.metadata));
  assert.throws(() => archive.read("v"), RangeError);
  assert.throws(() => new Archive([1, 2]), TypeError);
});

test("an index that is not as the page says is refused", () => {
  const { index, payload } = plain();
  const text = JSON.stringify(index);
  const changes = {
    "a real": text.replace('"version":1', '"version":1.0'),
    "an exponent": text.replace('"parts":[1]', '"parts":[1e0]'),
    "a field twice": text.replace("{", '{"formats":[],'),
    "a byte order mark": `\ufeff${text}`,
    "more behind it": `${text}1`,
    "a constant": text.replace("1.5", "NaN"),
    "a tab in a string": text.replace("user", "us\ter"),
    "an unknown setting": text.replace('"version":1', '"version":1,"valueOf":1'),
    "a format of Object": text.replace('"raw"', '"constructor"'),
    "a type of Object": text.replaceAll('"float32"', '"toString"'),
    "too deep": text.replace("1.5", "[".repeat(600) + "]".repeat(600)),
  };
  for (const [what, changed] of Object.entries(changes)) {
    assert.notEqual(changed, text);
    assert.throws(() => new Archive(closed(changed, payload)), DecodeError, what);
  }
});

test("fields named like those of Object are fields", () => {
  const { index, payload } = plain();
  const text = JSON.stringify(index).replace('"of"', '"__proto__"').replace('"w"', '"__proto__"');
  const archive = new Archive(closed(text, payload));
  assert.deepEqual(archive.names(), ["__proto__"]);
  assert.deepEqual(Object.keys(archive.metadata), ["__proto__"]);
  assert.equal(archive.read("__proto__").data[0], 1);
});

test("every flipped bit and every cut is refused", () => {
  const { index, payload } = plain();
  const data = closed(index, payload);
  const all = (bytes) => {
    const archive = new Archive(bytes);
    archive.names().forEach((name) => archive.read(name));
  };
  all(data);
  for (let at = 0; at < data.length; at++) {
    const changed = data.slice();
    changed[at] ^= 1 << at % 8;
    assert.throws(() => all(changed), DecodeError, `byte ${at}`);
    assert.throws(() => all(data.subarray(0, at)), DecodeError, `cut at ${at}`);
  }
});

test("one damaged tensor leaves the others", () => {
  const data = read("payloads");
  data[20] ^= 1;
  const archive = new Archive(data);
  const damaged = archive.names().filter((name) => {
    try {
      archive.read(name);
      return false;
    } catch (error) {
      return error instanceof DecodeError && error.message.includes(JSON.stringify(name));
    }
  });
  assert.equal(damaged.length, 1);
});

test("differences to a base are refused, and called so", () => {
  const data = read("payloads");
  data[10] = 1;
  assert.throws(() => new Archive(data), /differences to a base/);
  data[10] = 2;
  assert.throws(() => new Archive(data), /version or features/);
});

test("what takes too much is refused before it is taken", () => {
  const { index, payload } = plain();
  const data = closed(index, payload);
  assert.equal(new Archive(data, { maxBytes: 128 }).read("w").data.length, 4);
  assert.throws(() => new Archive(data, { maxBytes: 127 }).read("w"), LimitError);
  index.metadata = { x: "a".repeat(3 << 20) };
  assert.throws(() => new Archive(closed(index, payload)), LimitError);
});

test("every floating type can be read as float32", () => {
  const archive = new Archive(read("numbers"));
  for (const [name, { dtype }] of archive.tensors) {
    if (/float/.test(dtype)) assert.ok(archive.readFloat32(name) instanceof Float32Array);
    else assert.throws(() => archive.readFloat32(name), TypeError);
  }
  const halves = archive.read("float16").data;
  const singles = archive.readFloat32("float16");
  halves.forEach((code, i) => {
    const exponent = (code >> 10) & 31;
    if (exponent === 0 || exponent === 31) return;
    assert.equal(singles[i], (1 + (code & 1023) / 1024) * 2 ** (exponent - 15));
  });
});
