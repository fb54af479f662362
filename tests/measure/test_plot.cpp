// Charts are for eyes; these look at the pixels a mistake would move.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "tests/measure/plot.h"

using plot::Image, plot::Panel;

namespace {

// Rows (from, to) in which the colour of the first line appears.
struct Span {
  int from = -1, to = -1, pixels = 0;
};
Span blue(const Image& m, int x0, int x1) {
  Span s;
  for (int y = 0; y < m.height; y++)
    for (int x = x0; x < x1; x++) {
      const uint8_t* p = &m.rgb[(static_cast<size_t>(y) * static_cast<size_t>(m.width) + static_cast<size_t>(x)) * 3];
      if (p[0] != 0 || p[1] != 114 || p[2] != 178) continue;
      if (s.from < 0) s.from = y;
      s.to = y, s.pixels++;
    }
  return s;
}

Panel panel(std::vector<plot::Point> points) { return {"title", "x", "y", {{"", std::move(points)}}}; }

}  // namespace

TEST_CASE("a chart: pixels, and y from 0") {
  const Panel both[] = {panel({{0, 50}, {4096, 100}}), panel({{512, 10}})};
  const Image m = plot::draw(both);
  CHECK(m.width == 1400);
  CHECK(m.height == 600);
  REQUIRE(m.rgb.size() == 1400 * 600 * 3);
  // the legend has the colour, too: below row 540
  const Span half = blue(m, 150, 300), full = blue(m, 500, 680);
  CHECK(half.pixels > 20);
  CHECK(full.from < half.from - 50);  // twice as much is higher
  CHECK(full.from > 60);
  CHECK(blue(m, 760, 1400).pixels > 20);  // a line of one point
}

TEST_CASE("a chart of nothing, of too much, of what is no number") {
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  CHECK(plot::draw({}).rgb.size() == 1400 * 600 * 3);
  const Panel odd[] = {panel({}), panel({{0, 0}}), panel({{0, 3}}), panel({{nan, 1}, {1, nan}, {inf, 1}, {1, inf}, {-1, 1}, {1, -1}}),
                       panel({{1e30, 1e30}, {1e-30, 1e-30}})};
  for (const Panel& p : odd) CHECK(plot::draw({&p, 1}, 300, 300).rgb.size() == 300 * 300 * 3);
  CHECK(plot::draw(odd, 7, 5).rgb.size() == 7 * 5 * 3);
  Panel many = panel({{1, 1}, {2, 2}});
  for (int i = 0; i < 100; i++)
    many.series.push_back({"a name with \xc3\xa9 and \x01 " + std::string(static_cast<size_t>(i), '~'), {{1.0 + i, 2.0}}});
  CHECK(plot::draw({&many, 1}).rgb.size() == 1400 * 600 * 3);
  for (int i = 100; i < 150; i++) many.series.push_back({"series " + std::to_string(i), {{1.0 + i, 2.0}}});
  const Span line = blue(plot::draw({&many, 1}), 100, 1300);  // names must not take the room of the lines
  CHECK(line.from < 200);
  CHECK(line.to - line.from > 50);
}

TEST_CASE("a chart as a file") {
  const Panel p = panel({{1, 1}, {1024, 2}});
  const std::vector<uint8_t> file = plot::png(plot::draw({&p, 1}, 400, 300));
  if (!plot::can_write_png()) {
    CHECK(file.empty());
    return;
  }
  const std::vector<uint8_t> head = {0x89, 'P', 'N', 'G', 13, 10, 26, 10, 0, 0, 0, 13, 'I', 'H', 'D', 'R',
                                     0, 0, 400 >> 8, 400 & 255, 0, 0, 300 >> 8, 300 & 255};
  REQUIRE(file.size() > 100);
  CHECK(std::vector<uint8_t>(file.begin(), file.begin() + 24) == head);
  CHECK(std::string(file.end() - 8, file.end() - 4) == "IEND");
}
