import assert from "node:assert/strict";
import test from "node:test";
import { constants, deflateSync } from "node:zlib";
import { DecodeError } from "../src/errors.js";
import { multiply } from "../src/factors.js";
import { inflate } from "../src/inflate.js";
import { parse, plain } from "../src/json.js";
import { restore, toNumbers } from "../src/numbers.js";
import { octaves } from "../src/tables.js";

/** Numbers below 2^32 that look random and are the same each time. */
function* noise(seed) {
  for (let state = seed; ; ) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    yield (state ^ (state >>> 15)) >>> 0;
  }
}

test("streams of every kind of block unpack", () => {
  const chance = noise(1);
  const next = () => chance.next().value;
  const texts = [new Uint8Array(0), Uint8Array.of(7), new Uint8Array(70000).fill(3)];
  texts.push(Uint8Array.from({ length: 5000 }, next));
  texts.push(Uint8Array.from({ length: 40000 }, (_, i) => (next() % 9) * (i % 5)));
  const { Z_FIXED, Z_HUFFMAN_ONLY, Z_RLE, Z_DEFAULT_STRATEGY } = constants;
  for (const text of texts) {
    for (const strategy of [Z_FIXED, Z_HUFFMAN_ONLY, Z_RLE, Z_DEFAULT_STRATEGY]) {
      for (const level of [0, 1, 9]) {
        const packed = new Uint8Array(deflateSync(text, { level, strategy }));
        assert.deepEqual(inflate(packed, text.length), text);
        const longer = Uint8Array.from([...packed, 0]);
        assert.throws(() => inflate(longer, text.length), DecodeError);
        assert.throws(() => inflate(packed, text.length + 1), DecodeError);
        assert.throws(() => inflate(packed.subarray(0, -1), text.length), DecodeError);
        if (text.length) assert.throws(() => inflate(packed, text.length - 1), DecodeError);
      }
    }
  }
});

test("octaves are exact", () => {
  for (let d = 1; d <= 1 << 14; d++) {
    const bits = (BigInt(d) ** 64n).toString(16);
    const length = 4 * (bits.length - 1) + (32 - Math.clz32(parseInt(bits[0], 16)));
    assert.equal(octaves(d), length - 1, `${d}`);
  }
});

test("JSON is read as JSON.parse reads it, or refused as it refuses", () => {
  const texts = [
    "null", "true", "-0", "12", "1.5e3", '"\\u00e9\\n\\"\\\\/"', "[]", "[1,[2,{}]]", " { } ",
    '{"a":[1,2,{"b":"c"}],"":null}', "[1 , 2]\n",
  ];
  for (const text of texts) {
    assert.equal(JSON.stringify(plain(parse(text))), JSON.stringify(JSON.parse(text)), text);
  }
  const bad = [
    "", "nul", "truex", "01", "1.", ".5", "+1", "1e", "[1,]", "[1", '{"a"}', '{"a":1,}', "{a:1}",
    '"a', '"\\x"', '"\\u12"', "[1]]", "'a'", "NaN", '"\u0001"', '"\\', '{"a":1,"a":2}', "-",
  ];
  for (const text of bad) assert.throws(() => parse(text), DecodeError, text);
});

test("products are exact with and without pairs", () => {
  const chance = noise(5);
  for (const [rows, rank, columns, most] of [[5, 9, 7, 30], [4, 6, 8, 40000], [3, 1, 1, 9], [2, 0, 3, 1]]) {
    const value = () => (chance.next().value % (2 * most + 1)) - most;
    const left = Int32Array.from({ length: rows * rank }, () => (chance.next().value % 3 ? 0 : value()));
    const right = Int32Array.from({ length: rank * columns }, value);
    const zero = most >> 1;
    const scale = Float32Array.from({ length: rows }, (_, i) => (i % 2 ? -0.3 : 0.7));
    const found = multiply({ left: left.map((x) => x + zero), zero, right, rows, rank, columns, scale });
    for (let i = 0; i < rows; i++) {
      for (let j = 0; j < columns; j++) {
        let sum = 0n;
        for (let k = 0; k < rank; k++) {
          sum += BigInt(left[i * rank + k]) * BigInt(right[k * columns + j]);
        }
        const expected = Math.fround(Math.fround(Number(sum)) * scale[i]);
        assert.ok(Object.is(found[i * columns + j], expected), `${i} ${j}`);
      }
    }
  }
});

test("every number of a short type comes back, and halves go to the even one", () => {
  for (const type of ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]) {
    const bits = type.startsWith("float8") ? 8 : 16;
    const codes = (bits === 8 ? Uint8Array : Uint16Array).from({ length: 2 ** bits }, (_, i) => i);
    const numbers = toNumbers(codes, type);
    const again = restore(numbers, type, false);
    const numbersAgain = toNumbers(again, type);
    const half = 2 ** (bits - 1);
    for (let i = 0; i < codes.length; i++) {
      if (Number.isNaN(numbers[i])) assert.ok(Number.isNaN(numbersAgain[i]));
      else if (again[i] !== codes[i]) assert.fail(`${type} ${i}`);
      const above = numbers[i + 1];
      if (i + 1 >= half || !Number.isFinite(numbers[i]) || !Number.isFinite(above)) continue;
      const [between] = restore(Float64Array.of((numbers[i] + above) / 2), type);
      if (between !== i + (i % 2)) assert.fail(`${type} above ${i}`);
    }
  }
});
