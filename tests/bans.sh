#!/bin/sh
# Fails when a banned word appears outside the places bans.txt allows, or a file is too long.   usage: bans.sh BANS FILE...
# C++ comments and string literals are looked at too: a ban is about the reader as much as the linker, except that line comments
# ("//") are removed first, so that a comment may say why mmap is not used.
bans=$1; shift
awk -v bans="$bans" '
function trim(s) { gsub(/^[ \t]+|[ \t]+$/, "", s); return s }
BEGIN {
  while ((getline l < bans) > 0) {
    if (l ~ /^#/ || l !~ /\|/) continue
    n = split(l, a, " \\| ")
    if (n < 2) { print bans ": cannot read: " l; bad++; continue }
    rules++; pat[rules] = "(^|[^A-Za-z0-9_])(" trim(a[1]) ")"; text[rules] = trim(a[1]); why[rules] = trim(a[n])
    allowed[rules] = (n > 2) ? " " trim(a[2]) " " : " "
  }
  if (!rules) { print bans ": no rules"; bad++; exit }
}
function ok(r, path,   n, i, p) { n = split(allowed[r], p, " "); for (i = 1; i <= n; i++) if (index(path, p[i]) == 1) return 1; return 0 }
# whole words: the character after the match must not continue a word either
function hit(line, r,   rest, at, next_char) {
  rest = line
  while (match(rest, pat[r])) {
    at = RSTART + RLENGTH; next_char = substr(rest, at, 1)
    if (substr(rest, at - 1, 1) !~ /[A-Za-z0-9_]/ || next_char !~ /[A-Za-z0-9_]/) return 1
    rest = (substr(rest, RSTART, 1) ~ /[A-Za-z0-9_]/ ? "_" : " ") substr(rest, RSTART + 1)  # "^" must not match inside a word
  }
  return 0
}
FNR == 1 { files++; longest = 0 }
FNR == 1001 && FILENAME !~ /\.inc$/ { printf "%s: above 1,000 lines\n", FILENAME; bad++ }
{
  line = $0; sub(/\/\/.*/, "", line)
  for (r = 1; r <= rules; r++) if (hit(line, r) && !ok(r, FILENAME)) { printf "%s:%d: \"%s\" is banned here: %s\n", FILENAME, FNR, text[r], why[r]; bad++ }
}
END { if (!files) { print "no files read"; bad++ } printf "%d files, %d rules, %d broken\n", files, rules, bad; exit bad > 0 }' "$@"
