// A simulated GPU: adds devices of type "cuda" to a CPU build of PyTorch. The CPU's kernels do the arithmetic.
//
// Every operation runs immediately, on the same bytes, in the CPU's kernel (a boxed fallback for the CUDA dispatch
// key). The parts of a GPU that make it hard to program are simulated: streams, events, device memory, pinned memory,
// and a host that runs ahead of the device. README.md in this folder lists the faults that are detected.
//
// Vector clocks track the order of operations. An actor is a stream or a host thread. An operation on a stream is
// ordered after all earlier operations of that stream, and after everything that the launching host thread is ordered
// after. A host thread is ordered after a stream's work once it synchronizes with the stream, and after another
// thread's work once it is started by it, joins it or takes its result (see device.py). Two accesses to the same bytes,
// at least one of them a write, are a race if no such chain orders them, whichever actually ran first.
//
// Lock order: the GIL is never acquired while the mutex is held. Source locations are looked up before the mutex is
// locked. Objects whose destructors may run Python code are destroyed after it is unlocked.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <malloc.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>
#include <unordered_set>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using at::Tensor;
constexpr auto CUDA = DeviceType::CUDA;
constexpr int MAIN_THREAD = 0;     // actor of the thread that created the GPU, and of native threads such as autograd's
constexpr int NO_ACTOR = -1;
constexpr int POOL_SIZE = 32;      // streams in torch's pool, handed out round-robin
constexpr int POISON = 0xFF;       // bytes of this value are NaN in every floating-point format
constexpr size_t PAGE_BYTES = 4096;
constexpr size_t MAX_REPORTS = 1000;
constexpr int ERROR_INVALID = 1, ERROR_MEMORY = 2, ERROR_REGISTERED = 712, ERROR_NOT_REGISTERED = 713;

using Clock = std::vector<uint64_t>;  // indexed by actor: the actor's latest known time
using What = const std::string*;      // interned: an operation and its source location

struct Access {
  char *begin, *end;
  int actor;            // the stream, or the host thread that accessed pinned memory directly
  uint64_t time;
  int host;             // the launching host thread
  uint64_t host_time;
  bool is_write;
  What what;
};

enum class Kind { device, pinned, registered };

struct Block {
  char* base;
  size_t size;
  Kind kind;
  int stream = NO_ACTOR;  // the stream on which device memory was allocated
  DeviceIndex device = 0;
  std::set<int> recorded;  // streams passed to record_stream
  std::vector<Access> accesses;
};

struct Pending {  // a copy between device and pinned memory that may still be in flight
  int actor;
  uint64_t time;
  Tensor to, from;      // both as CPU tensors
  c10::Storage keep;    // host memory, kept alive as torch's allocator does; device memory is not: its reuse must show
  std::shared_ptr<Block> mapped;  // device memory, which stays mapped if the cache is emptied before the copy runs
  char *to_begin, *to_end, *from_begin, *from_end;
  std::vector<char> sent;  // the host's bytes at the launch of the copy
  bool is_poisoned;        // host memory is filled with POISON until the copy runs
  What what;
  bool touches(char* begin, char* end) const {
    return (to_begin < end && begin < to_end) || (from_begin < end && begin < from_end);
  }
};

struct Event {
  Clock clock;
  bool is_recorded = false;
  int host = MAIN_THREAD;
  uint64_t host_time = 0;
  int num_polls = 0;
  std::chrono::steady_clock::time_point at;
};

struct Memory {  // statistics of one device
  size_t allocated = 0, reserved = 0, peak_allocated = 0, peak_reserved = 0;
  int64_t num_ooms = 0, num_retries = 0;
};

struct Simulation {
  std::recursive_mutex mutex;
  // Settings
  int num_devices = 1;
  size_t memory_bytes = size_t(8) << 30, pin_limit = size_t(1) << 40;
  double capability = 8.9;
  // Actors: the main thread, the default stream of each device, then other streams and threads in order of creation
  std::deque<Clock> clocks{Clock(1, 0)};  // a deque, so that references to clocks stay valid when actors are added
  std::vector<DeviceIndex> device_of{-1};  // -1 for host threads
  std::map<DeviceIndex, std::vector<int>> pools;
  std::map<DeviceIndex, size_t> next_in_pool;
  // Memory
  std::map<char*, std::shared_ptr<Block>> blocks;  // by base address
  std::map<std::pair<int, size_t>, std::vector<std::shared_ptr<Block>>> free_blocks;  // by stream and size
  std::vector<std::pair<std::shared_ptr<Block>, Clock>> held_back;  // freed, but recorded streams may still use them
  std::map<DeviceIndex, Memory> memory;
  size_t pinned = 0;
  int last_error = 0;
  // Copies in flight, and finished copies to be destroyed
  std::deque<Pending> pending;
  std::vector<Pending> finished;
  // Records
  std::vector<std::pair<std::string, std::string>> reports;
  std::set<std::pair<std::string, std::string>> reported;
  std::map<std::string, int64_t> waits;      // how often the host waited for a device, by operation and source location
  std::set<std::string> refused;  // operations that CUDA refuses in torch's deterministic mode
  std::map<std::string, int64_t> attention;  // calls, by the kernel that CUDA would choose and source location
  int64_t num_operations = 0;
  std::unordered_set<std::string> interned;
};

Simulation& simulation() {
  static auto* made = new Simulation;  // never destroyed, because tensors outlive the interpreter
  return *made;
}

class Locked {  // holds the mutex; finished copies are destroyed after it is unlocked
 public:
  Locked() { simulation().mutex.lock(); ++depth; }
  ~Locked() {
    std::vector<Pending> finished;
    if (--depth == 0) finished.swap(simulation().finished);
    simulation().mutex.unlock();
  }
  Locked(const Locked&) = delete;

 private:
  static thread_local int depth;
};
thread_local int Locked::depth = 0;

thread_local DeviceIndex current_device = 0;
thread_local std::map<DeviceIndex, int> current_stream;

// ------------------------------------------------------------------------------------------------ clocks

uint64_t& part(Clock& clock, int actor) {
  if (int(clock.size()) <= actor) clock.resize(actor + 1, 0);
  return clock[actor];
}
uint64_t known(const Clock& clock, int actor) { return int(clock.size()) <= actor ? 0 : clock[actor]; }
void merge(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}
int new_actor(DeviceIndex device) {
  auto& s = simulation();
  s.clocks.emplace_back();
  s.device_of.push_back(device);
  return int(s.clocks.size()) - 1;
}

struct Thread {  // becomes an actor when it first uses a device
  int actor = MAIN_THREAD;
  Clock before;  // its clock before it became an actor
};
thread_local Thread this_thread;

int host() {
  if (this_thread.actor == NO_ACTOR) {
    this_thread.actor = new_actor(-1);
    merge(simulation().clocks[this_thread.actor], this_thread.before);
  }
  return this_thread.actor;
}

int default_stream(DeviceIndex device) {
  auto& s = simulation();
  while (int(s.clocks.size()) <= s.num_devices) new_actor(DeviceIndex(s.clocks.size() - 1));
  return device + 1;
}
int stream_of_pool(DeviceIndex device) {
  auto& s = simulation();
  default_stream(device);
  auto& pool = s.pools[device];
  if (pool.size() < POOL_SIZE) {
    pool.push_back(new_actor(device));
    return pool.back();
  }
  return pool[s.next_in_pool[device]++ % POOL_SIZE];
}
int stream_now(DeviceIndex device) {
  auto found = current_stream.find(device);
  return found == current_stream.end() ? default_stream(device) : found->second;
}

// ------------------------------------------------------------------------------------------------ reports

What intern(const std::string& text) { return &*simulation().interned.insert(text).first; }

// Return the innermost Python frame outside torch and the simulation, as "library/x.py:7 (f)".
std::string place_in_code() {
  if (!Py_IsInitialized()) return "";
  PyGILState_STATE gil = PyGILState_Ensure();
  static auto* names = new std::unordered_map<PyCodeObject*, std::string>;  // "" for frames to skip
  std::string found;
  PyFrameObject* frame = PyEval_GetFrame();
  Py_XINCREF(frame);
  while (frame) {
    PyCodeObject* code = PyFrame_GetCode(frame);
    auto known_name = names->find(code);
    if (known_name == names->end()) {
      Py_INCREF(code);  // kept alive, so that its address is not reused
      const char* text = PyUnicode_AsUTF8(code->co_filename);
      std::string file = text ? text : "?", shown;
      auto has = [&](const char* part) { return file.find(part) != std::string::npos; };
      if (!has("/torch/") && !has("simulated_gpu/device.py") && !has("/contextlib.py") && !has("/threading.py") &&
          !has("/concurrent/futures/") && file[0] != '<') {
        for (const char* top : {"/library/", "/networks/", "/tests/", "/site-packages/"}) {
          auto cut = file.rfind(top);
          if (cut != std::string::npos) { shown = file.substr(cut + 1); break; }
        }
        if (shown.empty()) shown = file.substr(file.rfind('/') + 1);
      }
      known_name = names->emplace(code, shown).first;
    }
    PyFrameObject* outer = nullptr;
    if (!known_name->second.empty()) {
      const char* function = PyUnicode_AsUTF8(code->co_name);
      found = known_name->second + ":" + std::to_string(PyFrame_GetLineNumber(frame)) + " (" + (function ? function : "?") + ")";
    } else {
      outer = PyFrame_GetBack(frame);
    }
    Py_DECREF(code);
    Py_DECREF(frame);
    frame = outer;
  }
  PyGILState_Release(gil);
  return found;
}
std::string at_place(const std::string& name) {
  std::string place = place_in_code();
  return place.empty() ? name + " in autograd's thread" : name + " at " + place;
}

void report(const std::string& kind, const std::string& text) {
  auto& s = simulation();
  if (s.reports.size() < MAX_REPORTS && s.reported.emplace(kind, text).second) s.reports.emplace_back(kind, text);
}
std::string name_of(int actor) {
  if (actor == MAIN_THREAD) return "the host";
  return (simulation().device_of[actor] < 0 ? "host thread " : "stream ") + std::to_string(actor);
}

// ------------------------------------------------------------------------------------------------ accesses and copies

std::shared_ptr<Block> find_block(const void* address) {
  auto& s = simulation();
  char* at = static_cast<char*>(const_cast<void*>(address));
  auto it = s.blocks.upper_bound(at);
  if (it == s.blocks.begin()) return nullptr;
  auto block = std::prev(it)->second;
  return at < block->base + block->size ? block : nullptr;
}
Block* block_of(const void* address) { return find_block(address).get(); }
bool is_pinned(const void* address) {
  Locked lock;
  auto* block = block_of(address);
  return block && block->kind != Kind::device;
}

bool is_ordered(const Access& old, int actor, int host) {
  auto& s = simulation();
  if (old.actor != actor) return known(s.clocks[actor], old.actor) >= old.time;
  // A stream runs operations in launch order, which is defined only if the launching threads are ordered.
  return old.host == host || known(s.clocks[host], old.host) >= old.host_time;
}
void note_access(Block& block, char* begin, char* end, int actor, bool is_write, What what) {
  auto& s = simulation();
  const int by = host();
  for (auto& old : block.accesses) {
    if (old.end <= begin || end <= old.begin || !(old.is_write || is_write) || is_ordered(old, actor, by)) continue;
    report("race", (is_write ? "write by " : "read by ") + *what + " on " + name_of(actor) + " is not ordered after the " +
                       (old.is_write ? "write by " : "read by ") + *old.what + " on " + name_of(old.actor));
    break;
  }
  auto& all = block.accesses;
  // Drop the records that are superseded: a write supersedes all accesses within its range, a read supersedes earlier
  // reads within its range by the same actor and host thread.
  all.erase(std::remove_if(all.begin(), all.end(), [&](const Access& old) {
    return begin <= old.begin && old.end <= end && (is_write || (!old.is_write && old.actor == actor && old.host == by));
  }), all.end());
  all.push_back({begin, end, actor, known(s.clocks[actor], actor), by, known(s.clocks[by], by), is_write, what});
}

std::pair<char*, char*> range_of(const Tensor& t) {
  if (t.numel() == 0 || !t.has_storage() || t._is_zerotensor()) return {nullptr, nullptr};
  char* begin = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return {begin, begin + (last + 1) * int64_t(t.itemsize())};
}

void copy_bytes(const Tensor& to, const Tensor& from) {  // on the CPU, without recording an access
  at::AutoDispatchBelowAutograd below;
  c10::impl::ExcludeDispatchKeyGuard no_modes(
      c10::DispatchKeySet(c10::DispatchKey::Python) | c10::DispatchKeySet(c10::DispatchKey::PythonTLSSnapshot));
  Tensor target = to;
  at::native::copy_(target, from, false);
}

void run(Pending& copy) {
  char* host_begin = copy.is_poisoned ? copy.to_begin : copy.from_begin;
  if (copy.is_poisoned) {
    if (std::any_of(copy.to_begin, copy.to_end, [](char byte) { return (unsigned char)byte != POISON; }))
      report("changed in flight", "the host wrote where a " + *copy.what + " had not arrived");
  } else if (!copy.sent.empty() && std::memcmp(copy.sent.data(), host_begin, copy.sent.size()) != 0) {
    report("changed in flight", "the host changed what a " + *copy.what + " had not read");
  }
  copy_bytes(copy.to, copy.from);
}
void run_pending(const std::function<bool(const Pending&)>& is_due) {  // in launch order
  auto& s = simulation();
  if (s.pending.empty()) return;
  std::deque<Pending> before, rest;
  before.swap(s.pending);
  for (auto& copy : before) {
    if (!is_due(copy)) { rest.push_back(std::move(copy)); continue; }
    run(copy);
    s.finished.push_back(std::move(copy));
  }
  s.pending.swap(rest);
}

void arrive(int by) {
  auto& s = simulation();
  run_pending([&](const Pending& copy) { return known(s.clocks[by], copy.actor) >= copy.time; });
}
void learn(const Clock& clock) {  // make this thread wait for everything up to the clock of a host thread
  const int by = host();
  merge(simulation().clocks[by], clock);
  arrive(by);
}
// Make this thread wait for the devices' work up to the clock of a stream. That orders it after no host thread: another
// thread may just have happened to launch its work in time.
void learn_of_devices(const Clock& clock) {
  auto& s = simulation();
  const int by = host();
  for (size_t actor = 0; actor < clock.size(); ++actor)
    if (s.device_of[actor] >= 0) part(s.clocks[by], int(actor)) = std::max(known(s.clocks[by], int(actor)), clock[actor]);
  arrive(by);
}
void host_waits(const std::string& what, const Clock& clock) {
  ++simulation().waits[what];
  learn_of_devices(clock);
}

// Start an operation on the current stream of a device and return the stream's actor.
int launch(DeviceIndex device) {
  auto& s = simulation();
  const int stream = stream_now(device), by = host();
  TORCH_CHECK(s.device_of[stream] == device, "the current stream belongs to another device");
  ++part(s.clocks[by], by);
  merge(s.clocks[stream], s.clocks[by]);
  ++part(s.clocks[stream], stream);
  return stream;
}
void access(const Tensor& t, int actor, bool is_write, What what) {
  auto [begin, end] = range_of(t);
  if (!begin) return;
  // The bytes are needed now, so earlier copies of them must run first. note_access checks whether the program ordered
  // them.
  run_pending([begin = begin, end = end, is_write](const Pending& copy) {
    return (copy.to_begin < end && begin < copy.to_end) || (is_write && copy.from_begin < end && begin < copy.from_end);
  });
  if (auto* block = block_of(begin)) note_access(*block, begin, end, actor, is_write, what);
}
// Record a direct host access to pinned memory. Copies in flight are not run: the host sees only data that has arrived.
void host_access(char* begin, char* end, bool is_write, const std::string& name) {
  {
    Locked lock;
    auto* block = begin ? block_of(begin) : nullptr;
    if (!block || block->kind == Kind::device) return;
  }
  std::string text = at_place(name);
  Locked lock;
  auto* block = block_of(begin);
  if (!block) return;
  auto& s = simulation();
  ++part(s.clocks[host()], host());
  note_access(*block, begin, end, host(), is_write, intern(text));
}

void raise_last_error() {  // as every kernel launch does
  auto& s = simulation();
  const int code = std::exchange(s.last_error, 0);
  if (!code) return;
  const char* name = code == ERROR_MEMORY       ? "out of memory"
                     : code == ERROR_REGISTERED ? "part or all of the requested memory range is already mapped"
                                                : "invalid argument";
  TORCH_CHECK(false, "CUDA error: ", name, " (left behind by an earlier call, found when this kernel was launched)");
}

// ------------------------------------------------------------------------------------------------ memory

size_t rounded(size_t size) { return std::max<size_t>(512, (size + 511) / 512 * 512); }

void give_back(const std::shared_ptr<Block>& block) {
  auto& s = simulation();
  s.blocks.erase(block->base);
  if (block->kind == Kind::device) s.memory[block->device].reserved -= block->size;
  if (block->kind == Kind::pinned) s.pinned -= block->size;
}
void give_back_free(DeviceIndex device) {
  auto& s = simulation();
  for (auto& [key, list] : s.free_blocks) {
    if (s.device_of[key.first] != device) continue;
    for (auto& block : list) give_back(block);
    list.clear();
  }
}
std::shared_ptr<Block> map_block(size_t size, Kind kind, int stream, DeviceIndex device) {
  void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(at != MAP_FAILED, "the host has no memory left for the simulated GPU");
  return {new Block{static_cast<char*>(at), size, kind, stream, device, {}, {}}, [](Block* block) {
    munmap(block->base, block->size);
    delete block;
  }};
}

void free_device(void* at) {
  Locked lock;
  auto& s = simulation();
  auto it = s.blocks.find(static_cast<char*>(at));
  if (it == s.blocks.end()) return;
  auto block = it->second;
  s.memory[block->device].allocated -= block->size;
  for (auto& old : block->accesses) {
    if (old.actor == block->stream || known(s.clocks[block->stream], old.actor) >= old.time || block->recorded.count(old.actor)) continue;
    report("freed in use", *old.what + " on " + name_of(old.actor) + " may still use memory of " + name_of(block->stream) +
                               " that is freed without record_stream");
    break;
  }
  if (block->recorded.empty()) {
    s.free_blocks[{block->stream, block->size}].push_back(block);
    return;
  }
  Clock needed;
  for (int stream : block->recorded) part(needed, stream) = known(s.clocks[stream], stream);
  s.held_back.emplace_back(block, needed);
}
void release_held_back(const Clock& clock) {
  auto& s = simulation();
  auto is_done = [&](const Clock& needed) {
    for (size_t i = 0; i < needed.size(); ++i) if (needed[i] > known(clock, int(i))) return false;
    return true;
  };
  for (auto& [block, needed] : s.held_back)
    if (is_done(needed)) s.free_blocks[{block->stream, block->size}].push_back(std::exchange(block, nullptr));
  s.held_back.erase(std::remove_if(s.held_back.begin(), s.held_back.end(), [](auto& one) { return !one.first; }), s.held_back.end());
}
void synchronize_device(DeviceIndex device) {
  auto& s = simulation();
  default_stream(device);
  for (size_t actor = 0; actor < s.clocks.size(); ++actor)
    if (s.device_of[actor] == device) learn_of_devices(s.clocks[actor]);
  release_held_back(s.clocks[host()]);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const DeviceIndex device = current_device;
    if (size == 0) return {nullptr, nullptr, &free_device, Device(CUDA, device)};
    Locked lock;
    auto& s = simulation();
    auto& memory = s.memory[device];
    const size_t whole = rounded(size);
    const int stream = stream_now(device);
    release_held_back(s.clocks[host()]);
    auto& own = s.free_blocks[{stream, whole}];
    std::shared_ptr<Block> block;
    if (!own.empty()) {  // reuse the most recently freed block immediately, so that late reads of it are detected
      block = own.back();
      own.pop_back();
      char *begin = block->base, *end = begin + whole;
      run_pending([&](const Pending& copy) { return copy.touches(begin, end); });
    } else {
      if (memory.reserved + whole > s.memory_bytes) {  // like torch: release the cache and retry
        ++memory.num_retries;
        synchronize_device(device);
        give_back_free(device);
      }
      if (memory.reserved + whole > s.memory_bytes) {
        ++memory.num_ooms;
        auto mib = [](size_t bytes) { return bytes / 1048576.0; };
        TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", mib(whole), " MiB. GPU ", int(device),
                         " has a total capacity of ", mib(s.memory_bytes), " MiB of which ", mib(s.memory_bytes - memory.reserved), " MiB is free.");
      }
      block = map_block(whole, Kind::device, stream, device);
      s.blocks[block->base] = block;
      memory.reserved += whole;
    }
    block->recorded.clear();
    memory.allocated += whole;
    memory.peak_allocated = std::max(memory.peak_allocated, memory.allocated);
    memory.peak_reserved = std::max(memory.peak_reserved, memory.reserved);
    std::memset(block->base, POISON, size);
    return {block->base, block->base, &free_device, Device(CUDA, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_device; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};
DeviceAllocator device_allocator;

void free_pinned(void* at) {  // copies in flight keep the memory alive, so there are none when this is called
  Locked lock;
  auto it = simulation().blocks.find(static_cast<char*>(at));
  if (it == simulation().blocks.end()) return;
  auto block = it->second;
  give_back(block);
}
struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, nullptr, &free_pinned, DeviceType::CPU};
    Locked lock;
    auto& s = simulation();
    size_t whole = PAGE_BYTES;
    while (whole < size) whole *= 2;  // torch rounds up to powers of two as well
    TORCH_CHECK(s.pinned + whole <= s.pin_limit, "CUDA error: out of memory (cudaHostAlloc)");
    auto block = map_block(whole, Kind::pinned, NO_ACTOR, 0);
    s.blocks[block->base] = block;
    s.pinned += whole;
    std::memset(block->base, POISON, size);
    return {block->base, block->base, &free_pinned, DeviceType::CPU};
  }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};
PinnedAllocator pinned_allocator;

int register_memory(uintptr_t address, size_t size) {  // cudaHostRegister
  Locked lock;
  auto& s = simulation();
  char *begin = reinterpret_cast<char*>(address), *end = begin + size;
  if (size == 0) return s.last_error = ERROR_INVALID;
  auto after = s.blocks.lower_bound(begin);
  if (block_of(begin) || (after != s.blocks.end() && after->first < end)) return s.last_error = ERROR_REGISTERED;
  if (s.pinned + size > s.pin_limit) return s.last_error = ERROR_MEMORY;
  s.blocks[begin] = std::make_shared<Block>(Block{begin, size, Kind::registered, NO_ACTOR, 0, {}, {}});
  s.pinned += size;
  return 0;
}
int unregister_memory(uintptr_t address) {  // cudaHostUnregister
  Locked lock;
  auto& s = simulation();
  auto it = s.blocks.find(reinterpret_cast<char*>(address));
  if (it == s.blocks.end() || it->second->kind != Kind::registered) return s.last_error = ERROR_NOT_REGISTERED;
  auto block = it->second;
  for (auto& old : block->accesses) {
    if (s.device_of[old.actor] < 0 || known(s.clocks[host()], old.actor) >= old.time) continue;
    report("unpinned in use", "memory is unpinned while a " + *old.what + " may still be under way");
    break;
  }
  s.pinned -= block->size;
  s.blocks.erase(it);
  return 0;
}

void (*free_plain)(void*) = nullptr;
void free_host(void* at) {
  {
    Locked lock;
    auto& s = simulation();
    char* begin = static_cast<char*>(at);
    auto it = s.blocks.lower_bound(begin);
    if (it != s.blocks.end() && it->first < begin + malloc_usable_size(at) && it->second->kind == Kind::registered) {
      report("freed while registered", std::to_string(it->second->size) + " bytes of main memory are freed without cudaHostUnregister");
      s.pinned -= it->second->size;
      s.blocks.erase(it);
    }
  }
  free_plain(at);
}
struct HostAllocator final : c10::Allocator {  // torch's own for main memory, which checks what is freed
  c10::DataPtr allocate(size_t size) override {
    auto data = c10::GetDefaultCPUAllocator()->allocate(size);
    data.compare_exchange_deleter(free_plain, &free_host);
    return data;
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_host; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};
HostAllocator host_allocator;

// ------------------------------------------------------------------------------------------------ random numbers

struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator inner;
  explicit DeviceGenerator(DeviceIndex device)
      : GeneratorImpl(Device(CUDA, device), c10::DispatchKeySet(c10::DispatchKey::CUDA)), inner(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  DeviceGenerator* clone_impl() const override {
    auto* made = new DeviceGenerator(device().index());
    made->inner = inner.clone();
    return made;
  }
};
const at::Generator& default_generator(DeviceIndex device) {
  Locked lock;
  static auto* made = new std::deque<at::Generator>;
  while (int(made->size()) < simulation().num_devices) made->push_back(at::make_generator<DeviceGenerator>(DeviceIndex(made->size())));
  return made->at(device < 0 ? current_device : device);
}

// ------------------------------------------------------------------------------------------------ the device as torch sees it

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static DeviceIndex index(Device d) { return d.index() < 0 ? current_device : d.index(); }
  static c10::Stream stream(DeviceIndex device, int actor) {
    if (actor == default_stream(device)) return c10::Stream(c10::Stream::DEFAULT, Device(CUDA, device));
    return c10::Stream(c10::Stream::UNSAFE, Device(CUDA, device), actor);
  }
  static int actor_of(const c10::Stream& s) { return s.id() == 0 ? default_stream(s.device_index()) : int(s.id()); }

  DeviceType type() const override { return CUDA; }
  Device exchangeDevice(Device d) const override {
    Device before(CUDA, current_device);
    setDevice(d);
    return before;
  }
  Device getDevice() const override { return Device(CUDA, current_device); }
  void setDevice(Device d) const override {
    TORCH_CHECK(d.index() < simulation().num_devices, "CUDA error: invalid device ordinal");
    uncheckedSetDevice(d);
  }
  void uncheckedSetDevice(Device d) const noexcept override { if (d.index() >= 0) current_device = d.index(); }
  DeviceIndex deviceCount() const noexcept override { return DeviceIndex(simulation().num_devices); }

  c10::Stream getStream(Device d) const override { Locked lock; return stream(index(d), stream_now(index(d))); }
  c10::Stream getDefaultStream(Device d) const override { Locked lock; return stream(index(d), default_stream(index(d))); }
  c10::Stream getStreamFromGlobalPool(Device d, bool) const override { return getNewStream(d); }
  c10::Stream getNewStream(Device d, int = 0) const override { Locked lock; return stream(index(d), stream_of_pool(index(d))); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    Locked lock;
    auto before = getStream(s.device());
    current_stream[s.device_index()] = actor_of(s);
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream s) const { return reinterpret_cast<void*>(s.id()); }  // no override: older torch lacks it
  bool queryStream(const c10::Stream& s) const override { synchronizeStream(s); return true; }
  void synchronizeStream(const c10::Stream& s) const override {
    std::string what = at_place("synchronize stream");
    Locked lock;
    host_waits(what, simulation().clocks[actor_of(s)]);
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    std::string what = at_place("synchronize device");
    Locked lock;
    ++simulation().waits[what];
    synchronize_device(device < 0 ? current_device : device);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& s) const override {
    Locked lock;
    auto* block = block_of(data.get());
    if (block && actor_of(s) != block->stream) block->recorded.insert(actor_of(s));
  }

  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void record(void** event, const c10::Stream& s, const DeviceIndex, const c10::EventFlag) const override {
    Locked lock;
    auto& sim = simulation();
    if (!*event) *event = new Event;
    auto* e = static_cast<Event*>(*event);
    const int stream = actor_of(s), by = host();
    ++part(sim.clocks[by], by);
    merge(sim.clocks[stream], sim.clocks[by]);
    *e = {sim.clocks[stream], true, by, known(sim.clocks[by], by), 0, std::chrono::steady_clock::now()};
  }
  // The result of a wait or a query depends on whether the event is already recorded: the two threads must be ordered.
  static bool is_recorded(void* event, const std::string& what) {
    auto* e = static_cast<Event*>(event);
    if (!e || !e->is_recorded) return false;
    auto& s = simulation();
    if (e->host != host() && known(s.clocks[host()], e->host) < e->host_time)
      report("unordered event", what + " on " + name_of(host()) + " is not ordered after the event's record by " + name_of(e->host));
    return true;
  }
  void block(void* event, const c10::Stream& s) const override {
    std::string what = at_place("wait for an event");
    Locked lock;
    if (is_recorded(event, what)) merge(simulation().clocks[actor_of(s)], static_cast<Event*>(event)->clock);
  }
  static bool is_known(const Event& e) {
    auto& s = simulation();
    const Clock& clock = s.clocks[host()];
    for (size_t actor = 0; actor < e.clock.size(); ++actor)
      if (s.device_of[actor] >= 0 && known(clock, int(actor)) < e.clock[actor]) return false;
    return true;
  }
  bool queryEvent(void* event) const override {
    std::string what = at_place("query an event");
    Locked lock;
    if (!is_recorded(event, what)) return true;
    auto* e = static_cast<Event*>(event);
    if (!is_known(*e) && ++e->num_polls <= 3) return false;  // completes after three polls
    learn_of_devices(e->clock);
    return true;
  }
  void synchronizeEvent(void* event) const override {
    std::string what = at_place("synchronize event");
    Locked lock;
    if (is_recorded(event, what)) host_waits(what, static_cast<Event*>(event)->clock);
  }
  double elapsedTime(void* first, void* second, const DeviceIndex) const override {
    Locked lock;
    auto *a = static_cast<Event*>(first), *b = static_cast<Event*>(second);
    TORCH_CHECK(a && b && a->is_recorded && b->is_recorded, "Both events must be recorded before calculating elapsed time.");
    TORCH_CHECK(is_known(*a) && is_known(*b), "CUDA error: device not ready");
    return std::chrono::duration<double, std::milli>(b->at - a->at).count();
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DeviceIndex(simulation().num_devices); }
  int getNumGPUs() const override { return simulation().num_devices; }
  DeviceIndex current_device() const override { return ::current_device; }
  DeviceIndex getCurrentDevice() const override { return ::current_device; }
  void setCurrentDevice(DeviceIndex d) const override { ::current_device = d; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { return d < 0 ? ::current_device : std::exchange(::current_device, d); }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return exchangeDevice(d); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  Device getDeviceFromPtr(void* at) const override {
    Locked lock;
    auto* block = block_of(at);
    return Device(CUDA, block ? block->device : 0);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex d) const override { return default_generator(d); }
  at::Generator getNewGenerator(DeviceIndex d) const override { return at::make_generator<DeviceGenerator>(d < 0 ? ::current_device : d); }
  std::string showConfig() const override { return "simulated GPU"; }
  void deviceSynchronize(DeviceIndex d) const override { Guard().synchronizeDevice(d); }
};

// ------------------------------------------------------------------------------------------------ operations

Tensor as_cpu(const Tensor& t) {  // a CPU tensor on the same bytes
  auto options = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
  Tensor seen = t.numel() == 0 ? at::empty_strided(t.sizes(), t.strides(), options)
                               : at::from_blob(t.data_ptr(), t.sizes(), t.strides(), options);
  if (t.is_conj()) seen._set_conj(true);
  if (t.is_neg()) seen._set_neg(true);
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) seen.unsafeGetTensorImpl()->set_wrapped_number(true);
  return seen;
}
Tensor empty_on(DeviceIndex device, const Tensor& like) {
  c10::DeviceGuard guard(Device(CUDA, device));
  return at::detail::empty_strided_generic(
      like.sizes(), like.strides(), &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), like.scalar_type());
}
bool is_on_device(const Tensor& t) { return t.defined() && t.device().type() == CUDA; }

// Operations whose CUDA kernels copy values to the host.
const std::set<std::string> READ_BY_HOST = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::equal",
    "aten::is_nonzero", "aten::unique_consecutive", "aten::bincount", "aten::histc", "aten::repeat_interleave.Tensor"};
// Operations that accept CPU tensors next to device tensors. Those of the first set copy them, and the host waits.
const std::set<std::string> COPY_FROM_CPU = {
    "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put", "aten::index_copy", "aten::_foreach_copy_"};
const std::set<std::string> TAKE_CPU = {"aten::lift_fresh", "aten::set_"};
const std::set<std::string> INDEX = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"};

const std::set<std::string> SOFTMAX = {"aten::_softmax", "aten::_log_softmax"};

void check_matmul_rules(const std::string& name, const std::vector<Tensor>& in) {
  const double capability = simulation().capability;
  if (name == "aten::_int_mm") {
    TORCH_CHECK(in[0].size(0) > 16, "self.size(0) needs to be greater than 16, but got ", in[0].size(0));
    TORCH_CHECK(in[0].size(1) % 8 == 0 && in[1].size(1) % 8 == 0, "_int_mm: sizes need to be multiples of 8");
    TORCH_CHECK(capability >= 7.5, "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul (int8)");
  } else if (name == "aten::_scaled_mm") {
    TORCH_CHECK(capability >= 8.9, "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9, or ROCm MI300+");
    TORCH_CHECK(in[0].stride(1) == 1, "Expected mat1 to be row major");
    TORCH_CHECK(in[1].stride(0) == 1, "Expected mat2 to be column major");
    TORCH_CHECK(in[0].size(1) % 16 == 0 && in[1].size(0) % 16 == 0 && in[1].size(1) % 16 == 0,
                "Trailing dimension of mat1 and shape of mat2 must be divisible by 16");
    TORCH_CHECK(!(in[0].scalar_type() == at::kFloat8_e5m2 && in[1].scalar_type() == at::kFloat8_e5m2),
                "Multiplication of two Float8_e5m2 matrices is not supported");
  }
}

class Call {  // one operation: converts its arguments to CPU tensors and its results to device tensors
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), schema_(op.schema()), stack_(stack), first_(stack->size() - schema_.arguments().size()),
        given_(stack->begin() + first_, stack->end()) {
    name_ = schema_.overload_name().empty() ? schema_.name() : schema_.name() + "." + schema_.overload_name();
  }

  void run() {
    for (size_t i = 0; i < given_.size(); ++i) convert(schema_.arguments()[i], (*stack_)[first_ + i]);
    if (device_ < 0) device_ = current_device;
    if (has_cpu_ && !used_.empty()) {
      const bool is_wrong_way = is(INDEX) && !is_on_device(given_[0].toTensor());
      TORCH_CHECK((is(COPY_FROM_CPU) || is(TAKE_CPU)) && !is_wrong_way,
                  "Expected all tensors to be on the same device, but found at least two devices, cuda:", int(device_), " and cpu! (", name_, ")");
    }
    if (is(simulation().refused) && (in_order_.empty() || schema_.name().find("cumsum") == std::string::npos || in_order_[0].is_floating_point()))
      at::globalContext().alertNotDeterministic(schema_.name().substr(6));  // raises in deterministic mode only
    std::string text = at_place(name_);
    {
      Locked lock;
      auto& s = simulation();
      raise_last_error();
      ++s.num_operations;
      what_ = intern(text);
      stream_ = launch(device_);
      for (auto& use : used_) access(use.on_device, stream_, use.is_write, what_);
      if (is(READ_BY_HOST) || (has_cpu_ && is(COPY_FROM_CPU)) || (has_mask_ && is(INDEX))) host_waits(text, s.clocks[stream_]);
    }
    if (!in_order_.empty()) check_matmul_rules(name_, in_order_);
    if (is(SOFTMAX)) widen_input();
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    for (auto& use : used_) {  // an out= tensor that was resized
      if (!use.is_write || use.on_cpu.sizes() == use.on_device.sizes()) continue;
      at::native::resize_(use.on_device, use.on_cpu.sizes());
      copy_bytes(as_cpu(use.on_device), use.on_cpu);
    }
    const size_t num_results = schema_.returns().size(), start = stack_->size() - num_results;
    for (size_t i = 0; i < num_results; ++i) bring(schema_.returns()[i], (*stack_)[start + i]);
  }

 private:
  struct Use { Tensor on_device, on_cpu; bool is_write; };
  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  torch::jit::Stack* stack_;
  size_t first_;
  std::vector<c10::IValue> given_;
  std::string name_;
  DeviceIndex device_ = -1;
  bool has_cpu_ = false, has_mask_ = false;
  std::vector<Use> used_;
  std::vector<Tensor> in_order_;
  What what_ = nullptr;
  int stream_ = NO_ACTOR;

  // CUDA's softmax can return float32 for half-precision input. On the CPU, float32 input gives the same result.
  void widen_input() {
    auto &input = (*stack_)[first_], &gives_float = (*stack_)[first_ + 2];
    if (!gives_float.toBool()) return;
    input = input.toTensor().to(at::kFloat);
    gives_float = false;
  }

  bool is(const std::set<std::string>& names) const { return names.count(name_) || names.count(schema_.name()); }

  Tensor taken(const Tensor& t, bool is_write) {
    if (!t.defined()) return t;
    if (!is_on_device(t)) {
      if (t.dim() > 0 && t.device().is_cpu()) has_cpu_ = true;
      return t;
    }
    if (device_ < 0) device_ = t.device().index();
    TORCH_CHECK(t.device().index() == device_, "Expected all tensors to be on the same device, but found at least two devices, cuda:",
                int(device_), " and cuda:", int(t.device().index()), "! (", name_, ")");
    used_.push_back({t, as_cpu(t), is_write});
    return used_.back().on_cpu;
  }
  void convert(const c10::Argument& argument, c10::IValue& value) {
    const bool is_write = argument.alias_info() && argument.alias_info()->isWrite();
    if (value.isTensor()) {
      if (is_on_device(value.toTensor())) in_order_.push_back(value.toTensor());
      value = taken(value.toTensor(), is_write);
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& t : value.toTensorList()) list.push_back(taken(t, is_write));
      value = c10::List<Tensor>(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : value.toOptionalTensorList()) {
        if (t && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte)) has_mask_ = true;
        list.push_back(t ? std::optional<Tensor>(taken(*t, is_write)) : t);
      }
      value = list;
    } else if (value.isDevice()) {
      if (value.toDevice().type() == CUDA) {
        device_ = Guard::index(value.toDevice());
        value = Device(at::kCPU);
      }
    } else if (value.isGenerator()) {
      if (value.toGenerator().device().type() == CUDA) value = inner_of(value.toGenerator());
    } else if (value.isNone() && argument.name() == "generator") {
      value = inner_of(default_generator(-1));
    } else if (value.isNone() && argument.name() == "device") {
      device_ = current_device;
      value = Device(at::kCPU);
    } else if (value.isBool() && argument.name() == "pin_memory") {
      value = false;
    }
  }
  static at::Generator inner_of(const at::Generator& generator) {
    return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
  }

  void bring(const c10::Argument& result, c10::IValue& value) {
    const auto* alias = result.alias_info();
    if (alias && alias->isWrite()) {  // an argument that the operation wrote to
      for (size_t i = 0; i < given_.size(); ++i) {
        const auto* from = schema_.arguments()[i].alias_info();
        if (from && from->isWrite() && from->beforeSets() == alias->beforeSets()) value = given_[i];
      }
    } else if (value.isTensor()) {
      value = brought(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& t : value.toTensorList()) list.push_back(brought(t));
      value = c10::List<Tensor>(list);
    }
  }
  Tensor brought(const Tensor& cpu) {
    if (!cpu.defined() || cpu.device().type() == CUDA) return cpu;
    char* at = cpu.numel() ? static_cast<char*>(cpu.data_ptr()) : nullptr;
    for (auto& use : used_) {  // a view of an argument
      const Tensor& t = use.on_device;
      if (!at || t.numel() == 0) continue;
      char* begin = static_cast<char*>(const_cast<void*>(t.storage().data()));
      if (begin <= at && at < begin + t.storage().nbytes())
        return at::native::as_strided_tensorimpl(t, cpu.sizes(), cpu.strides(), (at - begin) / int64_t(t.itemsize()));
    }
    Tensor made = empty_on(device_, cpu);
    if (!at) return made;
    Locked lock;
    access(made, stream_, true, what_);
    copy_bytes(as_cpu(made), cpu);
    return made;
  }
};
void any_operation(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) { Call(op, stack).run(); }

Device device_or_current(std::optional<Device> device) { return Device(CUDA, device && device->index() >= 0 ? device->index() : current_device); }
Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_generic(size, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_strided_generic(size, stride, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& to, const Tensor& given, bool non_blocking) {
  if (to.numel() == 0) return to;
  Tensor from = given.sizes() == to.sizes() ? given : given.expand(to.sizes());
  const bool writes_device = is_on_device(to), reads_device = is_on_device(from);
  const char* name = writes_device && reads_device ? "copy on the device" : writes_device ? "copy to the device" : "copy to the host";
  std::string text = at_place(name);
  Tensor cpu_to = writes_device ? as_cpu(to) : to, cpu_from = reads_device ? as_cpu(from) : from;
  Locked lock;
  auto& s = simulation();
  What what = intern(text);
  const DeviceIndex device = (reads_device ? from : to).device().index();
  if (writes_device && reads_device) {  // a kernel; the driver makes the other copies, without checking the last error
    raise_last_error();
    const DeviceIndex other = to.device().index();
    const int stream = launch(device), receives = stream_now(other);
    if (other != device) {  // torch makes each stream wait for the other
      launch(other);
      merge(s.clocks[stream], s.clocks[receives]);
    }
    access(from, stream, false, what);
    access(to, stream, true, what);
    copy_bytes(cpu_to, cpu_from);
    merge(s.clocks[receives], s.clocks[stream]);
    return to;
  }
  const int stream = launch(device);
  const Tensor& on_host = writes_device ? from : to;
  auto* host_block = block_of(on_host.data_ptr());
  const bool is_late = non_blocking && host_block && host_block->kind != Kind::device;
  access(from, stream, false, what);
  access(to, stream, true, what);
  if (!is_late) {
    copy_bytes(cpu_to, cpu_from);
    host_waits((non_blocking ? "unpinned " : "plain ") + text, s.clocks[stream]);
    return to;
  }
  auto [to_begin, to_end] = range_of(to);
  auto [from_begin, from_end] = range_of(from);
  const bool is_poisoned = !writes_device && to.is_non_overlapping_and_dense();
  if (is_poisoned) std::memset(to_begin, POISON, to_end - to_begin);
  std::vector<char> sent;
  if (writes_device) sent.assign(from_begin, from_end);
  s.pending.push_back({stream, known(s.clocks[stream], stream), as_cpu(to), as_cpu(from), on_host.storage(),
                       find_block((writes_device ? to : from).data_ptr()), to_begin, to_end, from_begin, from_end, std::move(sent), is_poisoned, what});
  return to;
}
Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  return copy_(target, from, non_blocking);
}
Tensor& copy_on_host(Tensor& to, const Tensor& from, bool non_blocking) {  // the host may access pinned memory here
  if (is_on_device(from)) return copy_(to, from, non_blocking);
  if (to.numel() && from.numel()) {
    auto [from_begin, from_end] = range_of(from);
    auto [to_begin, to_end] = range_of(to);
    host_access(from_begin, from_end, false, "copy on the host");
    host_access(to_begin, to_end, true, "copy on the host");
  }
  return at::native::copy_(to, from, non_blocking);
}
at::Scalar item(const Tensor& t) {
  std::string text = at_place("item");
  Locked lock;
  const int stream = launch(t.device().index());
  access(t, stream, false, intern(text));
  host_waits(text, simulation().clocks[stream]);
  return at::_local_scalar_dense(as_cpu(t));
}
void record_stream(Tensor& t, c10::Stream stream) { Guard().recordDataPtrOnStream(t.storage().data_ptr(), stream); }

// ------------------------------------------------------------------------------------------------ attention

// The rules by which CUDA builds choose a kernel. Rules shared with the CPU come from torch's header; GPU-specific
// rules follow aten/src/ATen/native/transformers/cuda/sdp_utils.cpp. cuDNN's kernel has priority only on sm90 and
// sm100, and no such GPU is simulated.
int64_t gemm_alignment(const Tensor& query) {
  const bool is_half = query.scalar_type() == at::kHalf || query.scalar_type() == at::kBFloat16;
  const double capability = simulation().capability;
  const bool has_tensor_cores = capability >= 8 || (capability >= 7 && is_half);
  return std::max<int64_t>(capability >= 8 ? 4 : 1, has_tensor_cores ? (is_half ? 8 : 4) : 1);
}
bool can_use_flash(const sdp::sdp_params& p) {
  const double capability = simulation().capability;
  const auto size = p.query.size(-1);
  const bool is_small_chip = (capability > 8.55 && capability < 8.95) || capability > 11.95;
  if (!at::globalContext().userEnabledFlashSDP() || capability < 8 || !sdp::check_tensor_shapes(p, false) || p.attn_mask) return false;
  if (size > 256 || p.key.size(-1) != size || p.value.size(-1) != size) return false;
  if (sdp::input_requires_grad(p) && is_small_chip && size > 192 && (p.dropout > 0 || size <= 224)) return false;
  if (p.is_causal && p.query.size(-2) != p.key.size(-2)) return false;
  return sdp::check_tensor_dtype(p, std::array<at::ScalarType, 2>{at::kHalf, at::kBFloat16}, false) &&
         sdp::check_batch_size_and_num_heads_dense<true>(p, false) && sdp::check_nonzero_sequence_lengths_dense(p, false) &&
         sdp::check_last_dim_stride_equals_1_dense<true>(p, false);
}
bool can_use_efficient(const sdp::sdp_params& p) {
  const double capability = simulation().capability;
  const int64_t alignment = gemm_alignment(p.query);
  if (!at::globalContext().userEnabledMemEfficientSDP() || !sdp::check_tensor_shapes(p, false)) return false;
  const auto size = p.query.size(-1), value_size = p.value.size(-1);
  if (p.key.size(-1) != size || size == 0 || value_size == 0 || size % alignment || value_size % alignment) return false;
  for (const Tensor* t : {&p.query, &p.key, &p.value})
    if (capability >= 8 && t->numel() && t->storage_offset() % alignment) return false;
  if (!sdp::check_nonzero_sequence_lengths_dense(p, false) || !sdp::check_last_dim_stride_equals_1_dense<false>(p, false) ||
      !sdp::check_batch_size_and_num_heads_dense<true>(p, false))
    return false;
  return capability >= 8 ? sdp::check_tensor_dtype(p, std::array<at::ScalarType, 3>{at::kHalf, at::kFloat, at::kBFloat16}, false)
                         : sdp::check_tensor_dtype(p, std::array<at::ScalarType, 2>{at::kHalf, at::kFloat}, false);
}
std::string shape_of(const Tensor& t) { return c10::str(t.scalar_type(), " ", t.sizes()); }

int64_t choose_attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, double dropout,
                         bool is_causal, std::optional<double>, bool enable_gqa) {
  const sdp::sdp_params p{query, key, value, mask, dropout, is_causal, enable_gqa};
  const bool has_flash = can_use_flash(p), has_efficient = !has_flash && can_use_efficient(p);
  TORCH_CHECK(has_flash || has_efficient || at::globalContext().userEnabledMathSDP(), "No available kernel. Aborting execution.");
  std::string text = has_flash ? "flash" : has_efficient ? "efficient" : "math";
  if (!has_flash && !has_efficient)
    text += ": query " + shape_of(query) + ", key " + shape_of(key) + ", value " + shape_of(value) + (mask ? ", mask " + shape_of(*mask) : "");
  text = at_place(text);
  Locked lock;
  ++simulation().attention[text];
  return int64_t(at::SDPBackend::math);  // the math kernel always does the arithmetic
}

// ------------------------------------------------------------------------------------------------ processes

// Simulated NCCL: collectives run on a separate stream, after the work that is already on the current stream. Waiting
// for a collective makes the current stream wait, not the host. gloo transfers the data between the processes.
class Arrival final : public c10d::Work {
 public:
  Arrival(Clock clock, DeviceIndex device) : clock_(std::move(clock)), device_(device) {}
  bool isCompleted() override { return true; }
  bool isSuccess() const override { return true; }
  void synchronize() override {
    Locked lock;
    merge(simulation().clocks[stream_now(device_)], clock_);
  }
  bool wait(std::chrono::milliseconds) override { synchronize(); return true; }

 private:
  Clock clock_;
  DeviceIndex device_;
};

class Collectives final : public c10d::Backend {
 public:
  Collectives(c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) : Backend(rank, size), gloo_(std::move(gloo)) {}
  const std::string getBackendName() const override { return "simulated"; }

  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<Tensor>& tensors, const c10d::BroadcastOptions& options) override {
    return carry("broadcast", {}, tensors, [&](auto& in, auto& out) { return gloo_->broadcast(out, options); });
  }
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<Tensor>& tensors, const c10d::AllreduceOptions& options) override {
    return carry("allreduce", {}, tensors, [&](auto& in, auto& out) { return gloo_->allreduce(out, options); });
  }
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<Tensor>>& out, std::vector<Tensor>& in,
                                           const c10d::AllgatherOptions& options) override {
    TORCH_CHECK(out.size() == 1, "allgather takes one tensor of each process");
    return carry("allgather", in, out[0], [&](auto& cpu_in, auto& cpu_out) {
      std::vector<std::vector<Tensor>> lists{cpu_out};
      return gloo_->allgather(lists, cpu_in, options);
    });
  }
  c10::intrusive_ptr<c10d::Work> _allgather_base(Tensor& out, Tensor& in, const c10d::AllgatherOptions& options) override {
    return carry("allgather", {in}, {out}, [&](auto& cpu_in, auto& cpu_out) {
      return gloo_->_allgather_base(cpu_out[0], cpu_in[0], options);
    });
  }
  c10::intrusive_ptr<c10d::Work> _reduce_scatter_base(Tensor& out, Tensor& in, const c10d::ReduceScatterOptions& options) override {
    return carry("reduce_scatter", {in}, {out}, [&](auto& cpu_in, auto& cpu_out) {
      return gloo_->_reduce_scatter_base(cpu_out[0], cpu_in[0], options);
    });
  }
  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions&) override {  // the host waits for this collective
    const DeviceIndex device = ::current_device;
    gloo_->barrier()->wait();
    std::string text = at_place("barrier");
    Locked lock;
    ++simulation().waits[text];
    synchronize_device(device);
    return c10::make_intrusive<Arrival>(Clock(), device);
  }

 private:
  c10::intrusive_ptr<c10d::Backend> gloo_;
  int stream_ = NO_ACTOR;

  template <class Carry>
  c10::intrusive_ptr<c10d::Work> carry(const std::string& name, std::vector<Tensor> in, std::vector<Tensor> out, Carry given) {
    for (auto& t : in) TORCH_CHECK(is_on_device(t), "no backend type associated with device type cpu");
    for (auto& t : out) TORCH_CHECK(is_on_device(t), "no backend type associated with device type cpu");
    const DeviceIndex device = out.at(0).device().index();
    std::string text = at_place(name);
    std::vector<Tensor> cpu_in, cpu_out;
    {
      Locked lock;
      auto& s = simulation();
      if (stream_ == NO_ACTOR) stream_ = stream_of_pool(device);
      What what = intern(text);
      const int by = host();
      ++part(s.clocks[by], by);
      ::merge(s.clocks[stream_], s.clocks[by]);
      ::merge(s.clocks[stream_], s.clocks[stream_now(device)]);
      ++part(s.clocks[stream_], stream_);
      for (auto& t : in) { access(t, stream_, false, what); cpu_in.push_back(as_cpu(t)); record_stream_of(t); }
      for (auto& t : out) { access(t, stream_, true, what); cpu_out.push_back(as_cpu(t)); record_stream_of(t); }
    }
    given(cpu_in, cpu_out)->wait();
    Locked lock;
    return c10::make_intrusive<Arrival>(simulation().clocks[stream_], device);
  }
  void record_stream_of(const Tensor& t) {  // like the NCCL backend, which keeps a collective's tensors alive
    auto* block = block_of(t.storage().data());
    if (block) block->recorded.insert(stream_);
  }
};

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&any_operation>()); }
// CUDA has an operation of its own for these, and the CPU does not.
Tensor conv_depthwise2d_on_host(const Tensor& input, const Tensor& weight, at::IntArrayRef, const std::optional<Tensor>& bias,
                                at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  return at::conv2d(input, weight, bias, stride, padding, dilation, input.size(1));
}

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("copy_", copy_on_host);
  m.impl("_conv_depthwise2d", conv_depthwise2d_on_host);
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_local_scalar_dense", item);
  m.impl("record_stream", record_stream);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("view.dtype", at::native::view_dtype);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(at::native::set_));
  m.impl("set_.source_Tensor", at::native::set_tensor_);
}

// Apply the settings. Memory, clocks and records are kept.
void configure(int num_devices, size_t memory_bytes, size_t pin_limit, double capability) {
  Locked lock;
  auto& s = simulation();
  TORCH_CHECK(s.clocks.size() == 1 || num_devices == s.num_devices, "the number of simulated GPUs cannot change");
  s.num_devices = num_devices;
  s.memory_bytes = memory_bytes;
  s.pin_limit = pin_limit;
  s.capability = capability;
}
void clear_reports() {
  Locked lock;
  auto& s = simulation();
  s.reports.clear();
  s.reported.clear();
  s.waits.clear();
  s.attention.clear();
}
std::map<std::string, int64_t> stats(int device) {
  Locked lock;
  auto& s = simulation();
  auto& m = s.memory[DeviceIndex(device)];
  return {{"allocated", m.allocated}, {"peak_allocated", m.peak_allocated}, {"reserved", m.reserved}, {"peak_reserved", m.peak_reserved},
          {"memory", s.memory_bytes}, {"num_ooms", m.num_ooms}, {"num_retries", m.num_retries}, {"pinned", s.pinned},
          {"num_pending", int64_t(s.pending.size())}, {"num_operations", s.num_operations}};
}
std::tuple<int64_t, int, int> parts_of(const c10::Stream& s) { return {s.id(), int(s.device_index()), int(s.device_type())}; }
Device gpu(int index) { return Device(CUDA, DeviceIndex(index)); }

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  // torch looked up its hooks during import and keeps that object, which has no members: construct ours in its place.
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;
  at::globalContext().lazyInitDevice(CUDA);  // until then torch does not treat any memory as pinned
  c10::SetAllocator(CUDA, &device_allocator, 255);
  at::setHostAllocator(CUDA, &pinned_allocator, 255);
  free_plain = c10::GetDefaultCPUAllocator()->raw_deleter();
  c10::SetCPUAllocator(&host_allocator, 255);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
  m.def("configure", &configure);
  m.def("refuse_in_deterministic_mode", [](const std::set<std::string>& names) { simulation().refused = names; });
  m.def("clear_reports", &clear_reports);
  m.def("reports", [] { Locked lock; return simulation().reports; });
  m.def("waits", [] { Locked lock; return simulation().waits; });
  m.def("attention", [] { Locked lock; return simulation().attention; });
  m.def("stats", &stats);
  m.def("reset_peaks", [](int device) {
    Locked lock;
    auto& memory = simulation().memory[DeviceIndex(device)];
    memory.peak_allocated = memory.allocated;
    memory.peak_reserved = memory.reserved;
  });
  m.def("empty_cache", [] {  // waits for recorded streams alone, as torch's allocator does
    Locked lock;
    auto& s = simulation();
    for (auto& [block, needed] : s.held_back) learn_of_devices(needed);
    release_held_back(s.clocks[host()]);
    for (int device = 0; device < s.num_devices; ++device) give_back_free(DeviceIndex(device));
  });
  m.def("register_memory", &register_memory);
  m.def("unregister_memory", &unregister_memory);
  m.def("stream_now", [](int device) { return parts_of(Guard().getStream(gpu(device))); });
  m.def("default_stream", [](int device) { return parts_of(Guard().getDefaultStream(gpu(device))); });
  m.def("set_stream", [](int64_t id, int device) { Guard().exchangeStream(c10::Stream(c10::Stream::UNSAFE, gpu(device), id)); });
  m.def("device_now", [] { return int(current_device); });
  m.def("set_device", [](int device) {
    int before = current_device;
    Guard().setDevice(gpu(device));
    return before;
  });
  m.def("synchronize", [](int device) { Guard().synchronizeDevice(DeviceIndex(device)); });
  m.def("elapsed_ms", [](uintptr_t first, uintptr_t second) {
    return Guard().elapsedTime(reinterpret_cast<void*>(first), reinterpret_cast<void*>(second), 0);
  });
  m.def("default_generator", [](int device) { return default_generator(DeviceIndex(device)); });
  m.def("resize_storage", [](const Tensor& holder, size_t size) {  // a CPU build of torch refuses this for CUDA
    c10::Storage storage = holder.storage();
    c10::DeviceGuard guard(storage.device());
    auto data = device_allocator.allocate(size);
    const int64_t kept = std::min(size, storage.nbytes());
    if (kept) {
      Tensor to = at::from_blob(data.get(), {kept}, holder.options());
      to.copy_(at::from_blob(const_cast<void*>(storage.data()), {kept}, holder.options()));
    }
    storage.set_data_ptr(std::move(data));
    storage.set_nbytes(size);
  });
  m.def("collectives", [](const c10::intrusive_ptr<c10d::Backend>& gloo, int rank, int size) {
    return c10::intrusive_ptr<c10d::Backend>(c10::make_intrusive<Collectives>(gloo, rank, size));
  });
  // Host threads
  m.def("begin_thread", [](const Clock& before) { this_thread = {NO_ACTOR, before}; });
  m.def("clock", [] {
    Locked lock;
    return this_thread.actor == NO_ACTOR ? this_thread.before : simulation().clocks[this_thread.actor];
  });
  m.def("learn", [](const Clock& clock) {
    Locked lock;
    if (this_thread.actor == NO_ACTOR) merge(this_thread.before, clock);
    else learn(clock);
  });
  m.def("host_reads", [](const Tensor& t, const std::string& name) {
    auto [begin, end] = range_of(t);
    host_access(begin, end, false, name);
  });
}
