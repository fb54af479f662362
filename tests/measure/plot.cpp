// A chart is drawn in four steps: layout of the panel, axes, lines with their values, legend below.
#include "tests/measure/plot.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "ggml-lite/base/check.h"

#if __has_include(<stb/stb_image_write.h>)
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STB_IMAGE_WRITE_STATIC
#define STBI_WRITE_NO_STDIO
#include <stb/stb_image_write.h>
#define HAVE_STB 1
#else
#define HAVE_STB 0
#endif

namespace plot {

namespace {

// ---- letters ----------------------------------------------------------------------------------------------------------

// ASCII 32 to 126, 5 x 7 and a line for what hangs below; 19 letters side by side in each strip.
constexpr int kLetterWidth = 5, kLetterHeight = 8, kAdvance = 6, kStrip = 19;
constexpr const char* kLetters[] = {
    //        !     "     #     $     %     &     '     (     )     *     +     ,     -     .     /     0     1     2
    "..... ..#.. .#.#. .#.#. ..#.. ##..# .##.. ..#.. ...#. .#... ..... ..... ..... ..... ..... ....# .###. ..#.. .###.",
    "..... ..#.. .#.#. .#.#. .#### ##..# #..#. ..#.. ..#.. ..#.. ..#.. ..#.. ..... ..... ..... ....# #...# .##.. #...#",
    "..... ..#.. .#.#. ##### #.#.. ...#. #.#.. ..#.. .#... ...#. #.#.# ..#.. ..... ..... ..... ...#. #..## ..#.. ....#",
    "..... ..#.. ..... .#.#. .###. ..#.. .#... ..... .#... ...#. .###. ##### ..... ##### ..... ..#.. #.#.# ..#.. ...#.",
    "..... ..#.. ..... ##### ..#.# .#... #.#.# ..... .#... ...#. #.#.# ..#.. ..... ..... ..... .#... ##..# ..#.. ..#..",
    "..... ..... ..... .#.#. ####. #..## #..#. ..... ..#.. ..#.. ..#.. ..#.. ..##. ..... .##.. #.... #...# ..#.. .#...",
    "..... ..#.. ..... .#.#. ..#.. #..## .##.# ..... ...#. .#... ..... ..... ..##. ..... .##.. #.... .###. .###. #####",
    "..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..#.. ..... ..... ..... ..... ..... .....",
    //  3     4     5     6     7     8     9     :     ;     <     =     >     ?     @     A     B     C     D     E
    "##### ...#. ##### ..##. ##### .###. .###. ..... ..... ...#. ..... .#... .###. .###. .###. ####. .###. ####. #####",
    "...#. ..##. #.... .#... ....# #...# #...# .##.. .##.. ..#.. ..... ..#.. #...# #...# #...# #...# #...# #...# #....",
    "..#.. .#.#. ####. #.... ...#. #...# #...# .##.. .##.. .#... ##### ...#. ....# #.### #...# #...# #.... #...# #....",
    "...#. #..#. ....# ####. ..#.. .###. .#### ..... ..... #.... ..... ....# ...#. #.#.# ##### ####. #.... #...# ####.",
    "....# ##### ....# #...# .#... #...# ....# .##.. .##.. .#... ##### ...#. ..#.. #.### #...# #...# #.... #...# #....",
    "#...# ...#. #...# #...# .#... #...# ...#. .##.. .##.. ..#.. ..... ..#.. ..... #.... #...# #...# #...# #...# #....",
    ".###. ...#. .###. .###. .#... .###. .##.. ..... ..#.. ...#. ..... .#... ..#.. .#### #...# ####. .###. ####. #####",
    "..... ..... ..... ..... ..... ..... ..... ..... .#... ..... ..... ..... ..... ..... ..... ..... ..... ..... .....",
    //  F     G     H     I     J     K     L     M     N     O     P     Q     R     S     T     U     V     W     X
    "##### .###. #...# .###. ..### #...# #.... #...# #...# .###. ####. .###. ####. .#### ##### #...# #...# #...# #...#",
    "#.... #...# #...# ..#.. ...#. #..#. #.... ##.## ##..# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# #...#",
    "#.... #.... #...# ..#.. ...#. #.#.. #.... #.#.# #.#.# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# .#.#.",
    "####. #.### ##### ..#.. ...#. ##... #.... #.#.# #..## #...# ####. #...# ####. .###. ..#.. #...# #...# #.#.# ..#..",
    "#.... #...# #...# ..#.. ...#. #.#.. #.... #...# #...# #...# #.... #.#.# #.#.. ....# ..#.. #...# #...# #.#.# .#.#.",
    "#.... #...# #...# ..#.. #..#. #..#. #.... #...# #...# #...# #.... #..#. #..#. ....# ..#.. #...# .#.#. ##.## #...#",
    "#.... .#### #...# .###. .##.. #...# ##### #...# #...# .###. #.... .##.# #...# ####. ..#.. .###. ..#.. #...# #...#",
    "..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... .....",
    //  Y     Z     [     \     ]     ^     _     `     a     b     c     d     e     f     g     h     i     j     k
    "#...# ##### .###. #.... .###. ..#.. ..... .#... ..... #.... ..... ....# ..... ..##. ..... #.... ..#.. ...#. #....",
    "#...# ....# .#... #.... ...#. .#.#. ..... ..#.. ..... #.... ..... ....# ..... .#... ..... #.... ..... ..... #....",
    ".#.#. ...#. .#... .#... ...#. #...# ..... ..... .###. ####. .###. .#### .###. ####. .#### ####. .##.. ..##. #..#.",
    "..#.. ..#.. .#... ..#.. ...#. ..... ..... ..... ....# #...# #.... #...# #...# .#... #...# #...# ..#.. ...#. #.#..",
    "..#.. .#... .#... ...#. ...#. ..... ..... ..... .#### #...# #.... #...# ##### .#... #...# #...# ..#.. ...#. ##...",
    "..#.. #.... .#... ....# ...#. ..... ..... ..... #...# #...# #...# #...# #.... .#... .#### #...# ..#.. ...#. #.#..",
    "..#.. ##### .###. ....# .###. ..... ##### ..... .#### ####. .###. .#### .###. .#... ....# #...# .###. #..#. #..#.",
    "..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... .###. ..... ..... .##.. .....",
    //  l     m     n     o     p     q     r     s     t     u     v     w     x     y     z     {     |     }     ~
    ".##.. ..... ..... ..... ..... ..... ..... ..... .#... ..... ..... ..... ..... ..... ..... ...## ..#.. ##... .....",
    "..#.. ..... ..... ..... ..... ..... ..... ..... .#... ..... ..... ..... ..... ..... ..... ..#.. ..#.. ..#.. .....",
    "..#.. ##.#. ####. .###. ####. .#### #.##. .#### ####. #...# #...# #...# #...# #...# ##### ..#.. ..#.. ..#.. .#...",
    "..#.. #.#.# #...# #...# #...# #...# ##..# #.... .#... #...# #...# #...# .#.#. #...# ...#. .#... ..#.. ...#. #.#.#",
    "..#.. #.#.# #...# #...# #...# #...# #.... .###. .#... #...# #...# #.#.# ..#.. #...# ..#.. ..#.. ..#.. ..#.. ...#.",
    "..#.. #.#.# #...# #...# ####. .#### #.... ....# .#... #..## .#.#. #.#.# .#.#. .#### .#... ..#.. ..#.. ..#.. .....",
    ".###. #.#.# #...# .###. #.... ....# #.... ####. ..##. .##.# ..#.. .#.#. #...# ....# ##### ...## ..#.. ##... .....",
    "..... ..... ..... ..... #.... ....# ..... ..... ..... ..... ..... ..... ..... .###. ..... ..... ..... ..... .....",
};

// Whether pixel (column, row) of a letter is set.
bool letter_bit(char c, int column, int row) {
  const int i = (c >= 32 && c < 127 ? c : '?') - 32;
  return kLetters[i / kStrip * kLetterHeight + row][i % kStrip * kAdvance + column] == '#';
}

// ---- pixels -----------------------------------------------------------------------------------------------------------

struct Colour {
  uint8_t r, g, b;
};
constexpr Colour kInk{40, 40, 40}, kPale{110, 110, 110}, kGrid{226, 226, 226};
constexpr Colour kLines[] = {{0, 114, 178}, {213, 94, 0}, {0, 158, 115}, {204, 121, 167}, {230, 159, 0}, {86, 180, 233}, {90, 90, 90}};

int text_width(std::string_view s, int scale) { return s.empty() ? 0 : (static_cast<int>(s.size()) * kAdvance - 1) * scale; }

struct Canvas {
  Image image;

  void blend(int x, int y, Colour c, double alpha) {
    if (x < 0 || y < 0 || x >= image.width || y >= image.height) return;
    uint8_t* p = &image.rgb[(static_cast<size_t>(y) * static_cast<size_t>(image.width) + static_cast<size_t>(x)) * 3];
    const uint8_t to[] = {c.r, c.g, c.b};
    for (int i = 0; i < 3; i++) p[i] = static_cast<uint8_t>(std::lround(p[i] + (to[i] - p[i]) * alpha));
  }
  void fill(int x, int y, int w, int h, Colour c) {
    for (int j = 0; j < h; j++)
      for (int i = 0; i < w; i++) blend(x + i, y + j, c, 1);
  }
  // A line with round ends; a dot when both are the same point. Pixels are covered as far as their centre is inside.
  void line(double x0, double y0, double x1, double y1, double width, Colour c) {
    const double r = width / 2 + 0.5, dx = x1 - x0, dy = y1 - y0, length2 = dx * dx + dy * dy;
    for (int y = static_cast<int>(std::min(y0, y1) - r); y <= static_cast<int>(std::max(y0, y1) + r) + 1; y++)
      for (int x = static_cast<int>(std::min(x0, x1) - r); x <= static_cast<int>(std::max(x0, x1) + r) + 1; x++) {
        const double t = length2 > 0 ? std::clamp(((x - x0) * dx + (y - y0) * dy) / length2, 0.0, 1.0) : 0;
        const double alpha = r - std::hypot(x - x0 - t * dx, y - y0 - t * dy);
        if (alpha > 0) blend(x, y, c, std::min(alpha, 1.0));
      }
  }
  // (x, y): top left corner
  void text(int x, int y, std::string_view s, int scale, Colour c) {
    for (size_t n = 0; n < s.size(); n++, x += kAdvance * scale)
      for (int row = 0; row < kLetterHeight; row++)
        for (int column = 0; column < kLetterWidth; column++)
          if (letter_bit(s[n], column, row)) fill(x + column * scale, y + row * scale, scale, scale, c);
  }
};

// ---- axes -------------------------------------------------------------------------------------------------------------

bool drawable(const Point& p) { return std::isfinite(p.x) && std::isfinite(p.y) && p.x >= 0 && p.y >= 0; }

std::string size_label(double x) {  // 512, 4K, 256K
  const bool k = x >= 1024 && std::fmod(x, 1024) == 0;
  return qn::format(k ? "%.0fK" : "%.6g", k ? x / 1024 : x);
}

std::string value_label(double y) {
  return y >= 1e6 ? qn::format("%.4gM", y / 1e6) : y >= 1e4 ? qn::format("%.3gk", y / 1e3) : qn::format(y >= 100 ? "%.0f" : "%.3g", y);
}

// Rising values at which something was measured; log2, with 0 a little to the left of the smallest other one.
struct XAxis {
  std::vector<double> values;
  double lo = 0, hi = 1, zero = 0;

  explicit XAxis(const Panel& panel) {
    for (const Series& s : panel.series)
      for (const Point& p : s.points)
        if (drawable(p)) values.push_back(p.x);
    std::ranges::sort(values);
    values.erase(std::ranges::unique(values).begin(), values.end());
    const auto positive = std::ranges::upper_bound(values, 0.0);
    if (positive == values.end()) return;
    lo = std::log2(*positive), hi = std::log2(values.back());
    if (positive != values.begin()) lo = zero = lo - std::max(1.0, (hi - lo) / 5);
    const double margin = std::max((hi - lo) * 0.05, 0.5);
    lo -= margin, hi += margin;
  }
  bool has_gap() const { return values.size() > 1 && values.front() == 0; }
  double at(double x) const { return ((x > 0 ? std::log2(x) : has_gap() ? zero : 0.5) - lo) / (hi - lo); }  // 0..1
};

struct YAxis {
  double step = 1, top = 1;

  explicit YAxis(const Panel& panel) {
    double most = 0;
    for (const Series& s : panel.series)
      for (const Point& p : s.points)
        if (drawable(p)) most = std::max(most, p.y);
    if (!(most > 0)) return;
    most *= 1.08;  // room for the value above the highest point
    const double power = std::pow(10, std::floor(std::log10(most / 5)));
    for (double m : {1.0, 2.0, 2.5, 5.0, 10.0})
      if (step = m * power; most / step <= 8) break;
    top = std::ceil(most / step) * step;
  }
};

// ---- a panel ----------------------------------------------------------------------------------------------------------

struct Box {
  int x, y, w, h;
  bool meets(const Box& o) const { return x < o.x + o.w && o.x < x + w && y < o.y + o.h && o.y < y + h; }
};

constexpr int kText = 2, kLine = kLetterHeight * kText, kLegendRow = kLine + 8, kKey = 34;  // kKey: the piece of line before a name

// Names in rows, as many as fit; where each begins, relative to the legend's corner. Fewer boxes than series: the one after the
// last name says so, for the chart needs its room.
std::vector<Box> legend_boxes(const Panel& panel, int width, int height) {
  std::vector<Box> boxes;
  int x = 0, y = 0;
  for (const Series& s : panel.series) {
    const int w = kKey + text_width(s.name, kText) + 24;
    if (x > 0 && x + w > width) x = 0, y += kLegendRow;
    if (y + 2 * kLegendRow > height && boxes.size() + 1 < panel.series.size()) {  // perhaps the last row
      boxes.push_back({0, x > 0 ? y + kLegendRow : y, width, kLegendRow});
      return boxes;
    }
    boxes.push_back({x, y, w, kLegendRow});
    x += w;
  }
  return boxes;
}

void mark(Canvas& c, double x, double y, size_t series) {
  const Colour colour = kLines[series % std::size(kLines)];
  if (series < std::size(kLines)) c.line(x, y, x, y, 9, colour);
  else c.fill(static_cast<int>(x) - 4, static_cast<int>(y) - 4, 9, 9, colour);  // colours are used again: tell them apart
}

void axes(Canvas& c, const Panel& panel, const Box& area, const XAxis& xs, const YAxis& ys) {
  for (int i = 0; i * ys.step <= ys.top * 1.001; i++) {
    const int y = area.y + area.h - static_cast<int>(std::lround(i * ys.step / ys.top * area.h));
    const std::string label = value_label(i * ys.step);
    c.fill(area.x, y, area.w, 1, i ? kGrid : kInk);
    c.text(area.x - 10 - text_width(label, kText), y - kLine / 2 + 1, label, kText, kPale);
  }
  c.fill(area.x, area.y, 1, area.h, kInk);
  int free_from = 0;
  for (double v : xs.values) {
    const int x = area.x + static_cast<int>(std::lround(xs.at(v) * area.w));
    const std::string label = size_label(v);
    const int w = text_width(label, kText), left = x - w / 2;
    c.fill(x, area.y + area.h, 1, 6, kInk);
    if (left < free_from) continue;
    c.text(left, area.y + area.h + 10, label, kText, kPale);
    free_from = left + w + 12;
  }
  if (xs.has_gap()) {  // 0 is not on a logarithmic scale
    const int x = area.x + static_cast<int>((xs.at(0) + xs.at(xs.values[1])) / 2 * area.w), y = area.y + area.h;
    c.fill(x - 3, y - 1, 7, 3, {255, 255, 255});
    c.line(x - 6, y + 6, x - 1, y - 6, 1.5, kInk), c.line(x + 1, y + 6, x + 6, y - 6, 1.5, kInk);
  }
  c.text(area.x + (area.w - text_width(panel.x_label, kText)) / 2, area.y + area.h + 36, panel.x_label, kText, kInk);
  c.text(area.x - 60, area.y - 28, panel.y_label, kText, kInk);
  c.text(area.x + (area.w - text_width(panel.title, kText)) / 2, area.y - 54, panel.title, kText, kInk);
}

void lines(Canvas& c, const Panel& panel, const Box& area, const XAxis& xs, const YAxis& ys) {
  struct Spot {
    double x, y, value;
    size_t series;
  };
  std::vector<Spot> spots;
  for (size_t n = 0; n < panel.series.size(); n++) {
    const Spot* before = nullptr;
    spots.reserve(spots.size() + panel.series[n].points.size());
    for (const Point& p : panel.series[n].points) {
      if (!drawable(p)) continue;
      spots.push_back({area.x + xs.at(p.x) * area.w, area.y + area.h - p.y / ys.top * area.h, p.y, n});
      const Spot& s = spots.back();
      if (before) c.line(before->x, before->y, s.x, s.y, 2.6, kLines[n % std::size(kLines)]);
      before = &s;
    }
  }
  std::vector<Box> taken;
  for (const Spot& s : spots) {
    mark(c, s.x, s.y, s.series);
    taken.push_back({static_cast<int>(s.x) - 5, static_cast<int>(s.y) - 5, 11, 11});
  }
  if (panel.series.size() > 4) return;
  for (const Spot& s : spots) {  // above the point, else below it, else not at all
    const std::string label = value_label(s.value);
    const int w = text_width(label, kText);
    const int left = std::clamp(static_cast<int>(s.x) - w / 2, area.x + 4, std::max(area.x + 4, area.x + area.w - w));
    for (int y : {static_cast<int>(s.y) - kLine - 7, static_cast<int>(s.y) + 10}) {
      const Box box{left, y, w, kLine};
      if (y + kLine > area.y + area.h || std::ranges::any_of(taken, [&](const Box& t) { return t.meets(box); })) continue;
      c.text(left, y, label, kText, kLines[s.series % std::size(kLines)]);
      taken.push_back(box);
      break;
    }
  }
}

// legend_height: of the tallest legend, so that panels line up
void panel_in(Canvas& c, const Panel& panel, const std::vector<Box>& legend, int legend_height, int left, int width) {
  const Box area{left + 84, 70, width - 84 - 30, c.image.height - 70 - 66 - legend_height - 12};
  if (area.w < 40 || area.h < 40) return;
  const XAxis xs(panel);
  const YAxis ys(panel);
  axes(c, panel, area, xs, ys);
  lines(c, panel, area, xs, ys);
  for (size_t n = 0; n < legend.size(); n++) {
    const int x = left + 36 + legend[n].x, y = c.image.height - legend_height - 8 + legend[n].y;
    if (n + 1 == legend.size() && legend.size() < panel.series.size()) {
      c.text(x, y, qn::format("and %zu more", panel.series.size() - n), kText, kPale);
      break;
    }
    c.line(x, y + kLine / 2 - 1, x + kKey - 12, y + kLine / 2 - 1, 2.6, kLines[n % std::size(kLines)]);
    mark(c, x + (kKey - 12) / 2, y + kLine / 2 - 1, n);
    c.text(x + kKey, y, panel.series[n].name, kText, kInk);
  }
}

}  // namespace

Image draw(std::span<const Panel> panels, int width, int height) {
  QN_CHECK(width > 0 && height > 0 && width <= 10000 && height <= 10000, "a picture of %d x %d", width, height);
  Canvas c{{width, height, std::vector<uint8_t>(static_cast<size_t>(width) * static_cast<size_t>(height) * 3, 255)}};
  const int n = static_cast<int>(panels.size());
  std::vector<std::vector<Box>> legends;
  int tallest = 0;
  for (const Panel& p : panels) {
    legends.push_back(legend_boxes(p, width / n - 60, height / 3));
    if (!legends.back().empty()) tallest = std::max(tallest, legends.back().back().y + kLegendRow);
  }
  for (int i = 0; i < n; i++) {
    const auto at = static_cast<size_t>(i);
    panel_in(c, panels[at], legends[at], tallest, width / n * i, width / n);
  }
  return std::move(c.image);
}

bool can_write_png() { return HAVE_STB; }

std::vector<uint8_t> png(const Image& image) {
  std::vector<uint8_t> out;
#if HAVE_STB
  const auto append = [](void* to, void* data, int n) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    static_cast<std::vector<uint8_t>*>(to)->insert(static_cast<std::vector<uint8_t>*>(to)->end(), bytes, bytes + n);
  };
  if (!stbi_write_png_to_func(append, &out, image.width, image.height, 3, image.rgb.data(), image.width * 3))
    qn::fail("the picture could not be encoded as PNG");
#else
  (void)image;
#endif
  return out;
}

}  // namespace plot
