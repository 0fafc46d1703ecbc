import { must } from "./errors.js";
import { toArray, toNumbers } from "./numbers.js";

const isSame = (a, b) => a.length === b.length && a.every((length, i) => length === b[i]);

/** The parts of one tensor; each is taken once, and at the end none may be left. */
export class Parts {
  /** @param parts by name: `{shape, holds, values}`, codes or the bytes of numbers. */
  constructor(parts) {
    this.parts = parts;
  }

  shape(name, axes) {
    const part = this.parts.get(name);
    must(part && part.shape.length === axes, `part ${name}: missing, or its shape`);
    return part.shape;
  }

  alphabet(name) {
    const holds = this.parts.get(name)?.holds;
    must(typeof holds === "number", `part ${name}: codes`);
    return holds;
  }

  take(name, shape, holds) {
    const part = this.parts.get(name);
    must(part, `part ${name}: missing`);
    must(isSame(part.shape, shape), `part ${name}: its shape`);
    must(part.holds === holds, `part ${name}: what it holds`);
    this.parts.delete(name);
    return part.values;
  }

  /** Codes, an Int32Array; of any alphabet where none is given. */
  codes(name, shape, alphabet = null) {
    const own = this.alphabet(name);
    return this.take(name, shape, alphabet ?? own);
  }

  /** Numbers of a floating type, as they stand: bits of the shorter floats. */
  array(name, shape, type) {
    return toArray(this.take(name, shape, type), type);
  }

  /** Numbers of a floating type as float32. */
  singles(name, shape, type) {
    return toNumbers(this.array(name, shape, type), type);
  }

  end() {
    must(this.parts.size === 0, "unknown part");
  }
}
