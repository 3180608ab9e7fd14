// Which rows of a sequence stand exact in its pages: the first E of them in the order of their slots.
//
// Layout     kernels/pages.py; the places of a page are named in its first head, for all heads alike
// Shapes     one warp per sequence
#ifndef KVSINK_PAGES
#define KVSINK_PAGES

struct PlaceParams {
  const unsigned char* named;  // of page 0 and its first head
  const int* pages;            // [B, page_row]
  const long long* length;     // [B] the last slot of a row that is seen; negative: none is
  int *exact_slot, *exact_at;  // [B, E], as Params
  long long page_row, page_bytes;
  int E, places, tiles;
};

KERNEL(32) list_exact(ARGUMENT(PlaceParams) p) {
  const int lane = TID & 31, b = CTA_X, last = (int)p.length[b];
  const int count = last < 0 ? 0 : last / 128 + 1 < p.tiles ? last / 128 + 1 : p.tiles;
  int *slots = p.exact_slot + (long long)b * p.E, *at = p.exact_at + (long long)b * p.E, found = 0;
  for (int i0 = 0; i0 < count && found < p.E; i0 += 32) {
    const int i = i0 + lane, page = i < count ? p.pages[b * p.page_row + i] : 0;
    const unsigned char* named = p.named + page * p.page_bytes;
    const auto seen = [&](int e) { return i < count && named[e] && 128 * i + named[e] - 1 <= last; };
    int mine = 0;
    for (int e = 0; e < p.places; e++) mine += seen(e) ? 1 : 0;
    int upto = mine;                                 // rows of this lane's page and of those before
#pragma unroll
    for (int n = 1; n < 32; n <<= 1) {
      const int other = shfl_int(upto, lane < n ? lane : lane - n);
      upto += lane < n ? 0 : other;
    }
    int to = found + upto - mine;
    for (int e = 0; e < p.places; e++) {
      if (!seen(e)) continue;
      if (to < p.E) {
        slots[to] = 128 * i + named[e] - 1;
        at[to] = 32 * page + e;
      }
      to++;
    }
    found += shfl_int(upto, 31);
  }
  for (int e = found + lane; e < p.E; e += 32) slots[e] = -1;
}
#endif
