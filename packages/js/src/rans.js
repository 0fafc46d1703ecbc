import { Bits, Bytes, width } from "./bits.js";
import { must } from "./errors.js";
import { frequencies, readTable } from "./tables.js";

const product = (shape) => shape.reduce((a, b) => a * b, 1);

/** Codec `bits`: codes of a shape, an Int32Array. */
export function decodeBits(payload, count, alphabet) {
  const data = new Bytes(payload);
  const codes = data.packed(count, width(alphabet));
  data.end();
  for (let i = 0; i < count; i++) must(codes[i] < alphabet, "code beyond the alphabet");
  return codes;
}

/** The head of a payload of codec `rans`. */
function readHead(payload, shape, alphabet) {
  const head = new Bits(payload);
  const windowed = head.u(1);
  const contextual = head.u(1);
  const laned = head.u(1);
  const precision = head.u(3) + 8;
  const steered = head.u(1);
  must(head.u(1) === 0, "reserved bit");
  const exponent = laned ? head.u(4) : 0;
  must(!laned || exponent >= 1, "lanes");
  const found = { precision, lanes: 2 ** exponent, shift: 0, begin: 0, size: alphabet, escapes: 0 };
  if (windowed) {
    found.shift = head.u(5);
    found.begin = head.gamma() - 1;
    found.size = head.gamma();
    found.escapes = head.gamma() - 1;
  }
  found.highs = Math.ceil(alphabet / 2 ** found.shift);
  must(found.shift < 24 && found.begin + found.size <= found.highs, "window");
  must(found.escapes <= product(shape), "window");
  found.stride = shape.length > 1 ? shape[shape.length - 1] : 1;
  found.machine = steered ? readMachine(head, found) : null;
  readContexts(head, found, contextual, shape);
  const sets = found.contexts * (steered ? 2 : 1);
  found.tables = [];
  for (let i = 0; i < sets; i++) {
    found.tables.push(readTable(head, found.size, found.escapes > 0, precision));
  }
  found.nbytes = head.finish();
  return found;
}

/** What a register is changed by where the quantizer, or the parity, is 1. */
function readMachine(head, { shift, escapes, lanes, stride }) {
  const a = head.gamma();
  const b = head.gamma();
  const degree = a < 512 ? 31 - Math.clz32(a) : 9;
  must(a % 2 === 1 && degree >= 1 && degree <= 8, "machine");
  must(b % 2 === 0 && b > 0 && b < 2 ** (degree + 1), "machine");
  must(shift === 0 && escapes === 0 && lanes <= stride, "machine");
  return { a: a >> 1, b: b >> 1 };
}

function readContexts(head, found, contextual, shape) {
  found.contexts = 1;
  found.offset = 0;
  found.axes = [];
  if (!contextual) return;
  found.contexts = head.u(4) + 1;
  found.offset = head.gamma() - 1;
  must(shape.length <= 8 && found.contexts >= 2 && found.offset <= 120, "contexts");
  for (let axis = 0; axis < shape.length; axis++) {
    if (head.u(1)) {
      const classes = head.u(4) + 1;
      found.axes.push({ axis, classes, coded: head.u(1) ? head.gamma() : null });
    }
  }
  must(found.axes.length > 0, "contexts without classes");
}

/**
 * Codec `rans` for codes: an Int32Array.
 *
 * @param plain whether contexts and machines are not allowed.
 */
export function decodeRans(payload, shape, alphabet, plain = false) {
  const count = product(shape);
  must(count >= 1 && count <= 2 ** 31 && alphabet >= 2, "codec not allowed here");
  const head = readHead(payload, shape, alphabet);
  must(!plain || (head.axes.length === 0 && !head.machine), "contexts not allowed here");
  const data = new Bytes(payload);
  data.take(head.nbytes);
  const context = readContext(data, head, shape, count);
  const low = head.shift ? data.packed(count, head.shift) : null;
  const escaped = data.packed(head.escapes, width(head.highs));
  const codes = decodeStream(data.rest(), head, context, count);
  if (!low && head.escapes === 0) {
    // Symbols lie within the window, and all of it within the alphabet.
    if (head.begin) for (let i = 0; i < count; i++) codes[i] += head.begin;
    return codes;
  }
  return withLowBitsAndEscapes(codes, low, escaped, head, alphabet);
}

function withLowBitsAndEscapes(codes, low, escaped, { begin, size, shift }, alphabet) {
  let used = 0;
  for (let i = 0; i < codes.length; i++) {
    let high = begin + codes[i];
    if (codes[i] === size) {
      must(used < escaped.length, "number of escapes");
      high = escaped[used++];
      must(high < begin || high >= begin + size, "escape within the window");
    }
    codes[i] = low ? (high << shift) | low[i] : high;
    must(codes[i] < alphabet, "code beyond the alphabet");
  }
  must(used === escaped.length, "number of escapes");
  return codes;
}

/** The context of every element, or null where there is one. */
function readContext(data, head, shape, count) {
  if (head.axes.length === 0) return null;
  let sums = new Int16Array([-head.offset]);
  const axes = new Map(head.axes.map((item) => [item.axis, item]));
  const last = shape.length - 1;
  for (let axis = 0; axis < last; axis++) {
    const length = shape[axis];
    const classes = axes.has(axis) ? readClasses(data, axes.get(axis), length) : null;
    const more = new Int16Array(sums.length * length);
    for (let i = 0, at = 0; i < sums.length; i++) {
      for (let j = 0; j < length; j++) more[at++] = sums[i] + (classes === null ? 0 : classes[j]);
    }
    sums = more;
  }
  const clipped = new Uint8Array(count);
  const classes = axes.has(last) ? readClasses(data, axes.get(last), shape[last]) : null;
  const most = head.contexts - 1;
  for (let i = 0, at = 0; i < sums.length; i++) {
    for (let j = 0; j < shape[last]; j++) {
      const sum = sums[i] + (classes === null ? 0 : classes[j]);
      clipped[at++] = sum < 0 ? 0 : sum > most ? most : sum;
    }
  }
  return clipped;
}

function readClasses(data, { classes, coded }, length) {
  if (coded !== null) return decodeRans(data.take(coded), [length], classes, true);
  const found = data.packed(length, width(classes));
  for (let i = 0; i < length; i++) must(found[i] < classes, "class");
  return found;
}

/** Symbol, and frequency and bias in one number, of every slot of all tables. */
function slots(head) {
  const total = 1 << head.precision;
  const symbol = new Int32Array(total * head.tables.length);
  const turn = new Uint32Array(total * head.tables.length);
  let at = 0;
  for (const { symbols, levels } of head.tables) {
    frequencies(levels, head.precision).forEach((frequency, rank) => {
      for (let bias = 0; bias < frequency; bias++, at++) {
        symbol[at] = symbols[rank];
        turn[at] = frequency * 65536 + bias;
      }
    });
  }
  return { symbol, turn };
}

function readStates(data, lanes) {
  const states = new Uint32Array(lanes);
  if (lanes === 1) {
    const count = data.left % 2 ? 3 : 4;
    data.take(count).forEach((byte, i) => {
      states[0] += byte * 2 ** (8 * i);
    });
    must(states[0] >= (count === 3 ? 2 ** 16 : 2 ** 24), "state");
    return states;
  }
  const lows = data.packed(lanes, 16);
  const lengths = data.packed(lanes, 4);
  const string = new Bits(data.data.subarray(data.at));
  for (let i = 0; i < lanes; i++) {
    states[i] = (string.u(lengths[i]) + 2 ** lengths[i]) * 65536 + lows[i];
  }
  data.take(string.finish());
  return states;
}

/** The symbol of every element. */
function decodeStream(stream, head, context, count) {
  const { tables, lanes, machine } = head;
  const most = Math.max(...tables.map(({ symbols }) => symbols.length));
  const out = new Int32Array(count);
  if (most === 1) {
    must(stream.length === 0 && lanes === 1 && !machine, "stream of single symbols");
    const only = tables.map(({ symbols }) => symbols[0]);
    if (!context) return out.fill(only[0]);
    for (let i = 0; i < count; i++) out[i] = only[context[i]];
    return out;
  }
  const bits = width(most);
  const rows = Math.ceil(count / lanes);
  const tail = Math.min(Math.floor(16 / bits), rows);
  must(rows <= 65536 && lanes <= count, "lanes");
  const data = new Bytes(stream);
  const states = readStates(data, lanes);
  must(data.left % 2 === 0, "half a word");
  const words = new Uint16Array(new Uint8Array(data.rest()).buffer); // this machine is little-endian, too

  const body = (rows - tail) * lanes;
  const registers = new Uint8Array(machine ? head.stride : 0);
  const turns = machine ? steeredTurns : freeTurns;
  const used = turns(out, body, states, words, context, head, registers);
  must(used === words.length, used < words.length ? "words left over" : "payload too short");
  for (let i = 0; i < lanes; i++) must(states[i] >>> 16 === 1, "last state");
  lastRows(out, body, bits, states, context, head, registers);
  return out;
}

/** All rows but the last ones; returns how many words are used, or more than there are. */
function freeTurns(out, body, states, words, context, head) {
  const { symbol, turn } = slots(head);
  const { precision, lanes } = head;
  const mask = (1 << precision) - 1;
  const end = words.length;
  let used = 0;
  for (let row = 0; row < body && used <= end; row += lanes) {
    for (let lane = 0; lane < lanes; lane++) {
      const at = row + lane;
      const state = states[lane];
      const slot = context === null ? state & mask : (state & mask) | (context[at] << precision);
      const moved = turn[slot];
      out[at] = symbol[slot];
      let next = (Math.imul(moved >>> 16, state >>> precision) + (moved & 0xffff)) | 0;
      if (next >>> 16 === 0) {
        if (used >= end) return end + 1;
        next = (next << 16) | words[used++];
      }
      states[lane] = next;
    }
  }
  return used;
}

/** The same where a machine chooses between two sets of tables. */
function steeredTurns(out, body, states, words, context, head, registers) {
  const { symbol, turn } = slots(head);
  const { precision, lanes, begin, stride, contexts } = head;
  const { a, b } = head.machine;
  const mask = (1 << precision) - 1;
  const end = words.length;
  let used = 0;
  let place = 0;
  for (let row = 0; row < body; row += lanes) {
    for (let lane = 0; lane < lanes; lane++) {
      const at = row + lane;
      const state = states[lane];
      const register = registers[place];
      const second = register & 1;
      const table = (context === null ? 0 : context[at]) + second * contexts;
      const slot = (state & mask) | (table << precision);
      const moved = turn[slot];
      const found = symbol[slot];
      out[at] = found;
      let next = (Math.imul(moved >>> 16, state >>> precision) + (moved & 0xffff)) | 0;
      if (next >>> 16 === 0) {
        if (used >= end) return end + 1;
        next = (next << 16) | words[used++];
      }
      states[lane] = next;
      registers[place] = (register >> 1) ^ (-second & a) ^ (-((found + begin) & 1) & b);
      if (++place === stride) place = 0;
    }
  }
  return used;
}

/** The rows whose ranks the last states hold. */
function lastRows(out, body, bits, states, context, head, registers) {
  const { tables, lanes, begin, stride, contexts, machine } = head;
  const fields = Uint16Array.from(states);
  const mask = (1 << bits) - 1;
  for (let at = body; at < out.length; at++) {
    const lane = at % lanes;
    const place = at % stride;
    const register = machine ? registers[place] : 0;
    const { symbols } = tables[(context ? context[at] : 0) + (register & 1) * contexts];
    const rank = fields[lane] & mask;
    must(rank < symbols.length, "rank");
    out[at] = symbols[rank];
    fields[lane] >>= bits;
    if (machine) {
      const { a, b } = machine;
      registers[place] =
        (register >> 1) ^ (-(register & 1) & a) ^ (-((out[at] + begin) & 1) & b);
    }
  }
  for (let lane = 0; lane < lanes; lane++) must(fields[lane] === 0, "unused bits");
}

/** Codec `rans` for numbers: `count` numbers of `size` bytes each. */
export function decodePlanes(payload, count, size) {
  must(count >= 1, "codec not allowed here");
  const head = new Bits(payload);
  const rotated = head.u(1);
  const lengths = [];
  for (let j = 0; j < size; j++) lengths.push(head.u(1) ? head.gamma() : null);
  const data = new Bytes(payload);
  data.take(head.finish());
  const numbers = new Uint8Array(count * size);
  lengths.forEach((length, j) => {
    const plane =
      length === null ? data.take(count) : decodeRans(data.take(length), [count], 256, true);
    for (let i = 0; i < count; i++) numbers[i * size + j] = plane[i];
  });
  data.end();
  if (rotated) {
    for (let i = 0; i < numbers.length; i += size) {
      const lowest = numbers[i] & 1;
      for (let j = 0; j < size; j++) {
        const above = j + 1 < size ? numbers[i + j + 1] & 1 : lowest;
        numbers[i + j] = (numbers[i + j] >> 1) | (above << 7);
      }
    }
  }
  return numbers;
}
