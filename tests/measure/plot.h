// Line charts as PNG files, for people to look at: plain data in, pixels out. Axes begin at 0 (y) and are logarithmic (x).
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace plot {

struct Point {
  double x, y;  // x >= 0, y >= 0; points that are not finite are left out
};
struct Series {
  std::string name;           // for the legend; characters beyond ASCII are drawn as '?'
  std::vector<Point> points;  // by rising x
};
struct Panel {
  std::string title, x_label, y_label;
  std::vector<Series> series;
};

struct Image {
  int width, height;
  std::vector<uint8_t> rgb;  // (height, width, 3), top row first
};

// The panels side by side.
Image draw(std::span<const Panel> panels, int width = 1400, int height = 600);

// Whether this build found stb_image_write.h; without it png() returns nothing.
bool can_write_png();
std::vector<uint8_t> png(const Image& image);  // the bytes of a file

}  // namespace plot
