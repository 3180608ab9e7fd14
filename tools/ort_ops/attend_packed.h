// AttendPacked: attention over the codes of the past, the rows kept exact and the new rows, as one node.
//
// The mask has a column for every row there is; codes and positions have slots for more, and nothing is read behind those held.
// One new row per sequence takes kvsink_attend of kernels/cpu/attend.c, which reads codes and never unpacks the past. Several
// new rows unpack the past once and attend to it as Attend does. What the node means is kvsink.export.bodies.
#pragma once

namespace {

void transpose(const float* a, int64_t m, int64_t n, float* out) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) out[j * m + i] = a[i * n + j];
}

// What one side's rows go through: the quantizer, and the transform before it.
struct PackedSide {
  Decoder decoder;
  std::string transform;
  int64_t order;
  bool center;
  std::vector<const float*> table_pointers;
  std::vector<float> rotation;  // [dim, dim], of a Hadamard transform

  PackedSide(const Attributes& a, const std::string& prefix)
      : decoder(Coding(a, prefix)), transform(a.text((prefix + "transform").c_str())), order(a.integer((prefix + "order").c_str())),
        center(a.integer((prefix + "center").c_str()) != 0) {
    for (const Table& table : decoder.tables_of) table_pointers.push_back(table.values.data());
    if (transform == "hadamard") {
      if (core_of(order) == 0) throw std::runtime_error("AttendPacked: no Hadamard matrix of this order");
      const int64_t dim = decoder.c.dim();
      rotation.assign(dim * dim, 0.0f);
      for (int64_t x = 0; x < dim; x++) {
        rotation[x * dim + x] = 1.0f;
        for (int64_t i = 0; i < dim; i += order) hadamard(rotation.data() + x * dim + i, order, false);
      }
    }
  }

  // Levels are in units of a table of every channel: deviations, or steps.
  bool scaled() const { return decoder.c.sigma() || decoder.c.walk() || decoder.c.kind == "static"; }

  packed::Side call(const Input& codes, const Input& scale, const Input& params, const Input& basis) const {
    const Coding& c = decoder.c;
    packed::Side s = decoder.side;
    const bool affine = !c.vector() && !scaled();
    const int64_t rows = codes.dims[2], heads = codes.dims[1];
    s.groups = affine ? c.dim() / c.group : 1, s.group_size = s.dim / s.groups;
    s.scales = c.scales(), s.stride_h = rows * s.row_bytes, s.stride_b = heads * s.stride_h;
    s.scale_h = rows * s.scales, s.scale_b = heads * s.scale_h;
    s.kind = affine ? (c.kind == "uniform-int" ? 3 : 2) : c.scales();
    s.tables = table_pointers.data();
    s.codes = codes.as<uint8_t>(), s.scale = scale.as<uint16_t>();
    if (c.vector()) {
      s.couple = c.book[3], s.code_bits = c.code_bits, s.book = params.floats();
      s.book_h = c.book[0] > 1 ? product(c.book, 1) : 0;
    }
    if (scaled()) s.sigma = params.floats();
    if (transform == "klt") s.basis = basis.floats(), s.basis_h = basis.dims[0] > 1 ? s.dim * s.dim : 0;
    if (transform == "hadamard") s.basis = rotation.data();
    return s;
  }
};

struct AttendPacked : Kernel {
  PackedSide k, v;
  float scale;
  int64_t span;  // tokens of a block of start angles, and rows of a table of means
  bool block;    // keys are coded in the frame of their block

  explicit AttendPacked(const Attributes& a)
      : k(a, "k_"), v(a, "v_"), scale(a.number("scale", 1.0f)), span(a.integer("span")), block(a.integer("in_block") != 0) {
    if (span < 1) throw std::runtime_error("AttendPacked: span is not positive");
  }

  struct Given {
    Input q, k, v, mask, positions, k_codes, k_scale, v_codes, v_scale, exact_k, exact_v, slot, cos, sin, table, k_basis, k_params,
        v_mean, v_basis, v_params;
    int64_t batch, heads, kv, rows, dim, wide, held, total, places, slots;

    explicit Given(const Call& call) {
      Input* all[] = {&q,    &k,      &v,       &mask, &positions, &k_codes, &k_scale, &v_codes, &v_scale, &exact_k,
                      &exact_v, &slot, &cos,    &sin,  &table,     &k_basis, &k_params, &v_mean,  &v_basis, &v_params};
      for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) *all[i] = call.input(i);
      batch = q.dims[0], heads = q.dims[1], rows = q.dims[2], dim = q.dims[3], kv = k.dims[1], wide = v.dims[3];
      total = mask.dims[3], held = total - rows, places = slot ? slot.dims[1] : 0, slots = k_codes.dims[2];
    }
    const float* of_head(const Input& table, int64_t h) const {
      return table ? table.floats() + (table.dims[0] > 1 ? h * product(table.dims, 1) : 0) : nullptr;
    }
  };

  void run(const Call& call) const override {
    const Given g(call);
    if (g.k_codes.dims[3] != k.decoder.c.bytes() || g.v_codes.dims[3] != v.decoder.c.bytes() || g.v_codes.dims[2] != g.slots)
      throw std::runtime_error("AttendPacked: codes of another width or length");
    if (g.held < 0 || g.held > g.slots || g.positions.dims[1] != g.slots)
      throw std::runtime_error("AttendPacked: a mask or positions of another length than the codes");
    if ((g.k_scale ? g.k_scale.dims[3] : 0) != k.decoder.c.scales() || (g.v_scale ? g.v_scale.dims[3] : 0) != v.decoder.c.scales())
      throw std::runtime_error("AttendPacked: scales of another width");
    if (g.k.dims[3] != k.decoder.c.dim() || g.wide != v.decoder.c.dim())
      throw std::runtime_error("AttendPacked: rows of another width than their codes");
    float* out = call.output<float>(0, {g.batch, g.heads, g.rows, g.wide});
    if (g.rows == 1 && g.held)
      one(g, out);
    else
      many(g, out);
  }

  int64_t place(int64_t position, const Given& g) const {
    return std::min(std::max<int64_t>(position, 0) / span, g.cos.dims[0] - 1);
  }

  // -- one new row ---------------------------------------------------------------------------------------------------------

  void one(const Given& g, float* out) const {
    const int64_t repeats = g.heads / g.kv, dim = g.dim, wide = g.wide;
    std::vector<int32_t> slot(g.batch * g.places), named(g.batch * (g.places + 1));
    for (size_t i = 0; i < slot.size(); i++) {
      const int64_t at = g.slot.integer(static_cast<int64_t>(i));
      slot[i] = static_cast<int32_t>(at < g.held ? at : -1);
    }
    packed::Call c = {};
    c.batch = g.batch, c.heads = g.kv, c.repeats = repeats, c.slots = g.total, c.coded = g.held, c.threads = threads();
    const int64_t wanted = (8 * threads() + g.batch * g.kv - 1) / (g.batch * g.kv);
    c.pieces = std::max<int64_t>(1, std::min(wanted, g.held / 128));
    c.key = k.call(g.k_codes, g.k_scale, g.k_params, g.k_basis), c.value = v.call(g.v_codes, g.v_scale, g.v_params, g.v_basis);
    c.q = g.q.floats(), c.q_h = dim, c.q_b = g.heads * dim, c.scale = scale;
    c.by_block = block, c.block = int64_t{1} << 30, c.blocks = 1;
    std::vector<float> mean(k.center ? g.kv * dim * span : 0);
    if (block || k.center) {
      c.block = span, c.blocks = g.cos.dims[0], c.rotary = g.cos.dims[1];
      c.start_cos = g.cos.floats(), c.start_sin = g.sin.floats();
    }
    for (int64_t h = 0; k.center && h < g.kv; h++) transpose(g.of_head(g.table, h), span, dim, mean.data() + h * dim * span);
    c.mean = k.center ? mean.data() : nullptr;
    c.value_mean = v.center ? g.v_mean.floats() : nullptr;
    c.positions = g.positions.as<int32_t>(), c.position_stride = g.positions.dims[0] > 1 ? g.slots : 0;
    c.mask_bool = g.mask.type == ort::kBool;
    c.mask = c.mask_bool ? static_cast<const void*>(g.mask.as<bool>()) : static_cast<const void*>(g.mask.floats());
    c.mask_h = g.mask.dims[1] > 1 ? g.total : 0, c.mask_b = g.mask.dims[0] > 1 ? g.mask.dims[1] * g.total : 0;
    if (g.places) c.rows[0] = rows_of(g.exact_k.floats(), g.exact_v.floats(), slot.data(), g.places, g);
    c.rows[packed::kFresh] = rows_of(g.k.floats(), g.v.floats(), nullptr, 1, g);
    c.rows[packed::kFresh].only = g.held;
    c.held = g.places + 1, c.slot = named.data();
    std::vector<float> work(g.batch * g.kv * c.pieces * repeats * (2 + wide));
    c.out = out, c.work = work.data();
    packed::kvsink_attend(&c);
  }

  static packed::Rows rows_of(const float* k, const float* v, const int32_t* slot, int64_t count, const Given& g) {
    packed::Rows rows = {};
    rows.k = k, rows.v = v, rows.slot = slot, rows.count = count, rows.slot_b = count;
    rows.k_row = g.dim, rows.k_h = count * g.dim, rows.k_b = g.kv * rows.k_h;
    rows.v_row = g.wide, rows.v_h = count * g.wide, rows.v_b = g.kv * rows.v_h;
    return rows;
  }

  // -- rows as they were ---------------------------------------------------------------------------------------------------

  void restore_value(const Given& g, int64_t h, float* x, float* scratch, bool scaled) const {
    const int64_t dim = g.wide;
    if (scaled) {
      const float* sigma = g.of_head(g.v_params, h);
      for (int64_t i = 0; i < dim; i++) x[i] *= sigma[i];
    }
    turn_forth(v, g.of_head(g.v_basis, h), dim, x, scratch);
    if (v.center) {
      const float* mean = g.v_mean.floats() + h * dim;
      for (int64_t i = 0; i < dim; i++) x[i] += mean[i];
    }
  }

  void restore_key(const Given& g, int64_t h, int64_t position, float* x, float* scratch) const {
    const int64_t dim = g.dim, rotary = g.cos ? g.cos.dims[1] : 0, at = g.cos ? place(position, g) * rotary : 0;
    turn_forth(k, g.of_head(g.k_basis, h), dim, x, scratch);
    const float* mean = k.center ? g.of_head(g.table, h) + (position % span + span) % span * dim : nullptr;
    if (block) {
      for (int64_t i = 0; mean != nullptr && i < dim; i++) x[i] += mean[i];
      rope(x, g.cos.floats() + at, g.sin.floats() + at, rotary, dim, scratch);
      std::copy(scratch, scratch + dim, x);
    } else if (mean != nullptr) {
      rope(mean, g.cos.floats() + at, g.sin.floats() + at, rotary, dim, scratch);
      for (int64_t i = 0; i < dim; i++) x[i] += scratch[i];
    }
  }

  static void turn_forth(const PackedSide& side, const float* basis, int64_t dim, float* x, float* scratch) {
    if (side.transform == "klt") {
      for (int64_t i = 0; i < dim; i++) scratch[i] = dot(basis + i * dim, x, dim);
      std::copy(scratch, scratch + dim, x);
    } else if (side.transform == "hadamard") {
      for (int64_t i = 0; i < dim; i += side.order) hadamard(x + i, side.order, true);
    }
  }

  // -- several new rows ----------------------------------------------------------------------------------------------------

  void many(const Given& g, float* out) const {
    const int64_t dim = g.dim, wide = g.wide, all = g.batch * g.kv;
    std::vector<float> keys(all * g.total * dim), values(all * g.total * wide);
    const int64_t k_bytes = k.decoder.c.bytes(), v_bytes = v.decoder.c.bytes(), k_scales = k.decoder.c.scales(), v_scales = v.decoder.c.scales();
#pragma omp parallel num_threads(threads()) if (all * g.held > 64)
    {
      std::vector<float> scratch(std::max(dim, wide));
#pragma omp for schedule(static)
      for (int64_t i = 0; i < all * g.held; i++) {
        const int64_t bh = i / g.held, l = i % g.held, h = bh % g.kv, b = bh / g.kv, row = bh * g.slots + l;
        float *key = keys.data() + (bh * g.total + l) * dim, *value = values.data() + (bh * g.total + l) * wide;
        k.decoder.row(g.k_codes.as<uint8_t>() + row * k_bytes, g.k_scale.as<half>() + row * k_scales, g.of_head(g.k_params, h), key);
        restore_key(g, h, g.positions.integer((g.positions.dims[0] > 1 ? b * g.slots : 0) + l), key, scratch.data());
        v.decoder.row(g.v_codes.as<uint8_t>() + row * v_bytes, g.v_scale.as<half>() + row * v_scales, g.of_head(g.v_params, h), value);
        restore_value(g, h, value, scratch.data(), false);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < all; i++) {
        lay(g, i, g.k.floats(), g.exact_k, dim, keys.data());
        lay(g, i, g.v.floats(), g.exact_v, wide, values.data());
      }
    }
    attend_rows(g.q, keys.data(), g.kv, g.total, values.data(), wide, g.mask, scale, out);
  }

  static void lay(const Given& g, int64_t i, const float* fresh, const Input& exact, int64_t dim, float* to) {
    to += i * g.total * dim;
    std::copy(fresh + i * g.rows * dim, fresh + (i + 1) * g.rows * dim, to + g.held * dim);
    for (int64_t e = 0; e < g.places; e++) {
      const int64_t at = g.slot.integer(i / g.kv * g.places + e);
      const float* row = exact.floats() + (i * g.places + e) * dim;
      if (at >= 0 && at < g.held) std::copy(row, row + dim, to + at * dim);
    }
  }
};

}  // namespace
