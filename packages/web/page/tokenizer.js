/** BERT's word pieces, uncased, as the `tokenizers` library cuts them. */

const LONGEST = 128;
const LONGEST_WORD = 100;
const SPACE = /[\t\n\r\p{Z}]/u;
const CONTROL = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\ufffd]/u;
const PUNCTUATION = /[!-/:-@[-`{-~\p{P}]/u;
const IDEOGRAPH =
  /[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u{20000}-\u{2a6df}\u{2a700}-\u{2b81f}\u{2b920}-\u{2ceaf}\u{2f800}-\u{2fa1f}]/u;

/** Words and single marks. */
function* words(text) {
  let word = "";
  for (const character of text) {
    const isSpace = SPACE.test(character);
    if (!isSpace && CONTROL.test(character)) continue;
    const isAlone = !isSpace && (PUNCTUATION.test(character) || IDEOGRAPH.test(character));
    if (isSpace || isAlone) {
      if (word) yield word;
      word = "";
    }
    if (isAlone) yield character;
    else if (!isSpace) word += character;
  }
  if (word) yield word;
}

export class Tokenizer {
  /** @param vocabulary one piece in each line. */
  constructor(vocabulary) {
    this.pieces = new Map(vocabulary.trimEnd().split(/\r?\n/).map((piece, id) => [piece, id]));
  }

  /** Token numbers of a text, with those of its begin and end. */
  encode(text) {
    const bare = text.normalize("NFD").replace(/\p{Mn}/gu, "");
    // One by one: of a whole text, JavaScript makes other letters of some, such as a last sigma.
    const plain = Array.from(bare, (character) => character.toLowerCase()).join("");
    const ids = [];
    for (const word of words(plain)) ids.push(...this.cut(word));
    const [begin, end] = ["[CLS]", "[SEP]"].map((piece) => this.pieces.get(piece));
    return [begin, ...ids.slice(0, LONGEST - 2), end];
  }

  /** The longest pieces from the left, or one unknown. */
  cut(word) {
    const unknown = [this.pieces.get("[UNK]")];
    const characters = [...word];
    if (characters.length > LONGEST_WORD) return unknown;
    const ids = [];
    for (let start = 0; start < characters.length; ) {
      let end = characters.length;
      let id;
      for (; end > start && id === undefined; end--) {
        const piece = characters.slice(start, end).join("");
        id = this.pieces.get(start ? `##${piece}` : piece);
      }
      if (id === undefined) return unknown;
      ids.push(id);
      start = end + 1;
    }
    return ids;
  }
}
