/**
 * Reads JSON as the specification of the index wants it: a field that stands twice is refused, and
 * `4.0` is not `4`. `JSON.parse` can tell neither.
 */

import { must } from "./errors.js";

const DEEPEST = 512;
const SPACE = /[ \t\n\r]*/y;
const NUMBER = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?/y;
const WORDS = { t: [true, "true"], f: [false, "false"], n: [null, "null"] };

/** A number that is written with a point or an exponent. */
export class Real {
  constructor(value) {
    this.value = value;
  }
}

class Reader {
  constructor(text) {
    this.text = text;
    this.at = 0;
  }

  /** What a sticky expression finds here, which is skipped. */
  match(expression) {
    expression.lastIndex = this.at;
    const found = expression.exec(this.text);
    if (found) this.at = expression.lastIndex;
    return found;
  }

  takes(character) {
    this.match(SPACE);
    const found = this.text[this.at] === character;
    if (found) this.at++;
    return found;
  }

  string() {
    this.match(SPACE);
    const begin = this.at;
    for (this.at++; ; this.at++) {
      // A loop: expressions with many alternatives in a row run out of stack in long strings.
      const code = this.text.charCodeAt(this.at);
      must(code >= 32, "index: a string is not JSON");
      if (code === 0x5c) this.at++;
      else if (code === 0x22) break;
    }
    const raw = this.text.slice(begin, ++this.at);
    if (!raw.includes("\\")) return raw.slice(1, -1);
    try {
      return JSON.parse(raw);
    } catch {
      must(false, "index: a string is not JSON");
    }
  }

  value(depth) {
    must(depth <= DEEPEST, "index: nested too deep");
    if (this.takes("{")) return this.object(depth);
    if (this.takes("[")) return this.array(depth);
    const first = this.text[this.at];
    if (first === '"') return this.string();
    const word = Object.hasOwn(WORDS, first ?? "") ? WORDS[first] : undefined;
    if (word) {
      must(this.text.startsWith(word[1], this.at), "index: no JSON");
      this.at += word[1].length;
      return word[0];
    }
    const number = this.match(NUMBER);
    must(number, "index: no JSON");
    const value = Number(number[0]);
    return number[1] === undefined && number[2] === undefined ? value : new Real(value);
  }

  object(depth) {
    const object = Object.create(null);
    if (this.takes("}")) return object;
    do {
      this.match(SPACE);
      must(this.text[this.at] === '"', "index: no JSON");
      const key = this.string();
      must(!(key in object), "index: a field stands twice");
      must(this.takes(":"), "index: no JSON");
      object[key] = this.value(depth + 1);
    } while (this.takes(","));
    must(this.takes("}"), "index: no JSON");
    return object;
  }

  array(depth) {
    const array = [];
    if (this.takes("]")) return array;
    do array.push(this.value(depth + 1));
    while (this.takes(","));
    must(this.takes("]"), "index: no JSON");
    return array;
  }
}

/** The value of a text; objects have no prototype, and reals are of class {@link Real}. */
export function parse(text) {
  const reader = new Reader(text);
  const value = reader.value(0);
  reader.match(SPACE);
  must(reader.at === text.length, "index: more than one value");
  return value;
}

/** The same with plain numbers. */
export function plain(value) {
  if (value instanceof Real) return value.value;
  if (Array.isArray(value)) return value.map(plain);
  if (!isObject(value)) return value;
  const object = Object.create(null);
  for (const key of Object.keys(value)) object[key] = plain(value[key]);
  return object;
}

/** Whether a value is a JSON object. */
export function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value) &&
    !(value instanceof Real);
}

/** Whether a value is a JSON integer within bounds. */
export function isInt(value, low, high) {
  return typeof value === "number" && value >= low && value <= high;
}
