import { must } from "./errors.js";

/** Bits of a code of an alphabet at fixed width; alphabets of up to 2^31. */
export function width(alphabet) {
  return 32 - Math.clz32(alphabet - 1);
}

/** Takes pieces off the front of a payload. */
export class Bytes {
  constructor(data) {
    this.data = data;
    this.at = 0;
  }

  get left() {
    return this.data.length - this.at;
  }

  take(count) {
    must(count <= this.left, "payload too short");
    this.at += count;
    return this.data.subarray(this.at - count, this.at);
  }

  rest() {
    return this.take(this.left);
  }

  /** `count` numbers of at most 24 bits, an Int32Array. */
  packed(count, bits) {
    const piece = this.take(Math.ceil((count * bits) / 8));
    const used = (count * bits) % 8;
    must(used === 0 || piece[piece.length - 1] >> used === 0, "unused bits");
    const numbers = new Int32Array(count);
    if (bits === 0) return numbers;
    const mask = (1 << bits) - 1;
    let ahead = 0;
    let have = 0;
    let at = 0;
    for (let i = 0; i < count; i++) {
      while (have < bits) {
        ahead |= piece[at++] << have;
        have += 8;
      }
      numbers[i] = ahead & mask;
      ahead >>>= bits;
      have -= bits;
    }
    return numbers;
  }

  end() {
    must(this.left === 0, "bytes left over");
  }
}

/** Reads a bit string at the front of a payload. Numbers may exceed 32 bits: no bit operators. */
export class Bits {
  constructor(data) {
    this.data = data;
    this.at = 0;
  }

  u(count) {
    must(this.at + count <= 8 * this.data.length, "payload too short");
    let value = 0;
    for (let got = 0; got < count; ) {
      const bit = this.at % 8;
      const some = Math.min(8 - bit, count - got);
      value += ((this.data[(this.at - bit) / 8] >> bit) & ((1 << some) - 1)) * 2 ** got;
      got += some;
      this.at += some;
    }
    return value;
  }

  /** The number of zero bits up to the next one bit, which is read, too. */
  zeros() {
    for (let count = 0; ; ) {
      must(this.at < 8 * this.data.length, "payload too short");
      const bit = this.at % 8;
      const rest = this.data[(this.at - bit) / 8] >> bit;
      if (rest !== 0) {
        const more = 31 - Math.clz32(rest & -rest);
        this.at += more + 1;
        return count + more;
      }
      count += 8 - bit;
      this.at += 8 - bit;
    }
  }

  gamma() {
    const count = this.zeros();
    must(count <= 32, "gamma too long");
    return this.u(count) + 2 ** count;
  }

  rice(k) {
    const high = this.zeros();
    return high * 2 ** k + this.u(k);
  }

  /** The number of bytes of the string, of which the last bits must be zero. */
  finish() {
    must(this.u((8 - (this.at % 8)) % 8) === 0, "unused bits");
    return this.at / 8;
  }
}
