/**
 * Unpacks zlib streams (RFC 1950, 1951) of a known size. The platform's own decompressors are
 * asynchronous, and differ in what they say of bytes behind the end.
 */

import { adler32 } from "./checksum.js";
import { must } from "./errors.js";

const LENGTHS = [
  3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131,
  163, 195, 227, 258,
];
const LENGTH_BITS = [
  0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0,
];
const DISTANCES = [
  1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049,
  3073, 4097, 6145, 8193, 12289, 16385, 24577,
];
const ORDER = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

/** A Huffman code: how many codes there are of each length, and their symbols in order. */
class Code {
  constructor(lengths, mayBeSingle) {
    this.counts = new Uint16Array(16);
    for (const length of lengths) this.counts[length]++;
    const none = this.counts[0] === lengths.length;
    this.counts[0] = 0;
    let left = 1;
    for (let length = 1; length < 16; length++) {
      left = 2 * left - this.counts[length];
      must(left >= 0, "index: more codes than there can be");
    }
    const single = none || (left === 1 << 14 && this.counts[1] === 1);
    must(left === 0 || (mayBeSingle && single), "index: codes are missing");
    const places = new Uint16Array(16);
    for (let i = 1; i < 15; i++) places[i + 1] = places[i] + this.counts[i];
    this.symbols = new Uint16Array(lengths.length);
    lengths.forEach((length, symbol) => {
      if (length) this.symbols[places[length]++] = symbol;
    });
  }
}

class Stream {
  constructor(data) {
    this.data = data;
    this.at = 0;
    this.ahead = 0;
    this.have = 0;
  }

  bits(count) {
    while (this.have < count) {
      must(this.at < this.data.length, "index: it is cut off");
      this.ahead |= this.data[this.at++] << this.have;
      this.have += 8;
    }
    const value = this.ahead & ((1 << count) - 1);
    this.ahead >>>= count;
    this.have -= count;
    return value;
  }

  symbol(code) {
    let value = 0;
    let first = 0;
    let index = 0;
    for (let length = 1; length < 16; length++) {
      value |= this.bits(1);
      const count = code.counts[length];
      if (value - first < count) return code.symbols[index + value - first];
      index += count;
      first = (first + count) << 1;
      value <<= 1;
    }
    must(false, "index: no such code");
  }
}

const fixed = (counts) => counts.flatMap(([count, length]) => new Array(count).fill(length));
const FIXED_LENGTHS = new Code(fixed([[144, 8], [112, 9], [24, 7], [8, 8]]), false);
const FIXED_DISTANCES = new Code(fixed([[32, 5]]), false);

/** The two codes that a block describes. */
function described(stream) {
  const counts = [stream.bits(5) + 257, stream.bits(5) + 1];
  const described = stream.bits(4) + 4;
  must(counts[0] <= 286 && counts[1] <= 30, "index: too many symbols");
  const orders = new Array(19).fill(0);
  for (let i = 0; i < described; i++) orders[ORDER[i]] = stream.bits(3);
  const code = new Code(orders, false);
  const lengths = [];
  while (lengths.length < counts[0] + counts[1]) {
    const symbol = stream.symbol(code);
    must(symbol !== 16 || lengths.length, "index: nothing to repeat");
    const repeated = symbol === 16 ? lengths[lengths.length - 1] : symbol < 16 ? symbol : 0;
    let times = 1;
    if (symbol === 16) times = 3 + stream.bits(2);
    if (symbol === 17) times = 3 + stream.bits(3);
    if (symbol === 18) times = 11 + stream.bits(7);
    while (times--) lengths.push(repeated);
  }
  must(lengths.length === counts[0] + counts[1] && lengths[256], "index: lengths of codes");
  return [new Code(lengths.slice(0, counts[0]), true), new Code(lengths.slice(counts[0]), true)];
}

/** The `size` bytes that a zlib stream, which must end where `data` does, unpacks to. */
export function inflate(data, size) {
  const stream = new Stream(data);
  const method = stream.bits(8);
  const flags = stream.bits(8);
  must((method & 15) === 8 && method >> 4 <= 7, "index: no zlib stream");
  must((method * 256 + flags) % 31 === 0 && !(flags & 32), "index: no zlib stream");
  const out = new Uint8Array(size);
  let at = 0;
  for (let last = 0; !last; ) {
    last = stream.bits(1);
    const kind = stream.bits(2);
    must(kind < 3, "index: no such block");
    if (kind === 0) {
      stream.bits(stream.have % 8);
      const length = stream.bits(16);
      must((length ^ stream.bits(16)) === 0xffff, "index: length of a block");
      must(at + length <= size, "index: it unpacks to more than it says");
      for (let i = 0; i < length; i++) out[at++] = stream.bits(8);
      continue;
    }
    const [lengths, distances] =
      kind === 1 ? [FIXED_LENGTHS, FIXED_DISTANCES] : described(stream);
    for (;;) {
      const symbol = stream.symbol(lengths);
      if (symbol === 256) break;
      if (symbol < 256) {
        must(at < size, "index: it unpacks to more than it says");
        out[at++] = symbol;
        continue;
      }
      must(symbol < 286, "index: no such length");
      const length = LENGTHS[symbol - 257] + stream.bits(LENGTH_BITS[symbol - 257]);
      const which = stream.symbol(distances);
      must(which < 30, "index: no such distance");
      const distance = DISTANCES[which] + stream.bits(which < 4 ? 0 : (which >> 1) - 1);
      must(distance <= at && at + length <= size, "index: a copy from outside");
      for (let i = 0; i < length; i++, at++) out[at] = out[at - distance];
    }
  }
  stream.bits(stream.have % 8);
  let sum = 0;
  for (let i = 0; i < 4; i++) sum = sum * 256 + stream.bits(8);
  must(at === size && stream.have === 0 && stream.at === data.length, "index: its length");
  must(sum === adler32(out), "index: its checksum");
  return out;
}
