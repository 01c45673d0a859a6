// Runs one kernel on the emulated device under ThreadSanitizer, which ends the program with status 66 where two threads
// of a block touch the same memory without a barrier between. Arguments: 1 if barriers order what threads do (0: to
// see that races are found); forward or backward; type, vector and lanes as of `emulate`; N, M, Lq (0: one query per
// pixel), P; how far locations lie apart; height and width of each level. Values are random, D is 32.
#include <random>
#include <string>

#define WATCH_RACES
#include "emulated_ms_deform_attn.cpp"

namespace {

std::minstd_rand generator(1);

template <typename T>
std::vector<T> random_numbers(int64_t count, float from, float to) {
  std::uniform_real_distribution<float> distribution(from, to);
  std::vector<T> numbers(count);
  for (T& number : numbers) number = static_cast<T>(distribution(generator));
  return numbers;
}

template <typename T>
int run_one(bool forward, int type, int vector, int lanes, int64_t N, int64_t M, int64_t Lq, int64_t P, float spread,
            const std::vector<int64_t>& shapes) {
  const int64_t L = shapes.size() / 2, D = 32;
  int64_t S = 0;
  for (int64_t level = 0; level < L; ++level) S += shapes[2 * level] * shapes[2 * level + 1];
  if (Lq == 0) Lq = S;
  const int64_t sizes[] = {N, S, M, D, Lq, L, P}, strides[] = {S * M * D, M * D, D, 1};
  const auto value = random_numbers<T>(N * S * M * D, -1, 1), grad_output = random_numbers<T>(N * Lq * M * D, -1, 1);
  const auto weights = random_numbers<float>(N * Lq * M * L * P, 0, 1);
  const auto locations = random_numbers<float>(2 * weights.size(), 0.5f - spread / 2, 0.5f + spread / 2);
  std::vector<T> output(grad_output.size());
  std::vector<float> grad_value(value.size()), grad_locations(locations.size()), grad_weights(weights.size());
  return deformable_detr::emulate(type, vector, lanes, sizes, shapes.data(), strides, value.data(), locations.data(),
                                  weights.data(), forward ? output.data() : nullptr, grad_output.data(),
                                  grad_value.data(), grad_locations.data(), grad_weights.data(), 0, 0.0f, 99 << 10);
}

}  // namespace

int main(int count, char** arguments) {
  emulation::has_order = arguments[1] == std::string("1");
  const bool forward = arguments[2] == std::string("forward");
  std::vector<int64_t> numbers, shapes;
  for (int i = 3; i < 10; ++i) numbers.push_back(std::stoll(arguments[i]));
  const float spread = std::stof(arguments[10]);
  for (int i = 11; i < count; ++i) shapes.push_back(std::stoll(arguments[i]));
  const auto run = numbers[0] == 1 ? run_one<float> : run_one<c10::BFloat16>;
  return run(forward, numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], spread,
             shapes);
}
