#!/usr/bin/env python3
"""Makes ggml-lite/text/unicode_tables.inc (on standard output). Neither the build nor the tests run this.

  pip install unicodedataplus==16.0.0 && python3 make_unicode_tables.py > ggml-lite/text/unicode_tables.inc

Categories are those of Unicode 16.0, normalisation data only of characters that Unicode 9.0 had: what Hugging Face tokenizers 0.23
does (its regular expressions know 16.0, its normaliser 9.0; seen by asking it about every code point), and so what the models were
trained on. Normalisation of an assigned character never changes, so the older version only means that newer marks stay as they are.
"""
import unicodedataplus as U

NFC_AGE = (9, 0)
WHITE_SPACE = {*range(0x9, 0xE), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
HANGUL = range(0xAC00, 0xD7A4)  # (de)composed by arithmetic

assert U.unidata_version == "16.0.0", U.unidata_version
old = set()
for c in CODE_POINTS:
    age = U.age(chr(c))
    if age[:1].isdigit() and tuple(int(x) for x in age.split(".")) <= NFC_AGE:
        old.add(c)

decompositions = {}  # one level: c -> (a, b), b = 0 when there is one
for c in sorted(old):
    d = U.decomposition(chr(c))
    if d and not d.startswith("<") and c not in HANGUL:
        parts = [int(x, 16) for x in d.split()]
        assert len(parts) <= 2 and c < 0x30000
        decompositions[c] = (parts + [0])[:2]
pairs = sorted((a, b, c) for c, (a, b) in decompositions.items() if b and U.normalize("NFC", chr(a) + chr(b)) == chr(c))
seconds = {b for _, b, _ in pairs} | set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))


def properties(c):
    if 0xD800 <= c < 0xE000:
        return 0
    kind = {"L": 1, "N": 2}.get(U.category(chr(c))[0], 3 if c in WHITE_SPACE else 0)
    ccc = U.combining(chr(c)) if c in old else 0
    changes = c in old and U.normalize("NFC", chr(c)) != chr(c)
    return ccc << 3 | (4 if ccc or changes or c in seconds else 0) | kind


runs, blocks, last = [], [], None
for c in range(0x110000):
    p = properties(c)
    if p != last:
        runs.append(c << 11 | p)
        last = p
    if c % 256 == 0:
        blocks.append(len(runs) - 1)
while blocks[-1] == blocks[-2]:
    blocks.pop()
order = {c: i for i, c in enumerate(sorted(decompositions))}


def table(kind, name, values):
    print(f"static const {kind} {name}[{len(values)}] = {{")
    line = "   "
    for v in values:
        if len(line) + len(v) > 126:
            print(line)
            line = "   "
        line += f" {v},"
    print(line + "\n};")


print("// Made by tests/data/make_unicode_tables.py; do not edit. Categories and White_Space of Unicode 16.0, normalisation data of the\n"
      "// characters of Unicode 9.0 (that script says why), from the Unicode Character Database; Hangul syllables are left to arithmetic.\n"
      "// clang-format off\n"
      "// Runs of code points alike: first << 11 | combining class << 3 | unstable under NFC << 2 | CharClass")
table("uint32_t", "kRuns", [hex(r) for r in runs])
print("// The run that holds code point 256 * i; the last entry stands for all further blocks")
table("uint16_t", "kRunOfBlock", [str(b) for b in blocks])
print("// Canonical decompositions, one level, by code point: {composed, first, second or 0}")
table("Decomposition", "kDecompositions", ["{%#x,%#x,%#x}" % (c, *decompositions[c]) for c in sorted(decompositions)])
print("// Those of them that also compose, ordered by (first, second)")
table("uint16_t", "kCompositions", [str(order[c]) for _, _, c in pairs])
