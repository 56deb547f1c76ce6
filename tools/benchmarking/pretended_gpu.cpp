// A GPU that is not there, for PyTorch without CUDA: autograd asks a device's guard for streams and events before it
// runs a backward, even on fake tensors. One device, one stream, nothing to wait for. Loaded before libtorch_cpu, whose
// own `getAccelerator` knows no CUDA; PyTorch with CUDA needs none of this.

#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {
namespace accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
} // namespace accelerator

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasPrimaryContext(DeviceIndex) const override {
    return true;
  }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
} // namespace at

namespace c10::impl {
struct PretendedGuard final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override {
    return Device(DeviceType::CUDA, 0);
  }
  Device exchangeDevice(Device) const override {
    return Device(DeviceType::CUDA, 0);
  }
  Stream getStream(Device) const noexcept override {
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0));
  }
  Stream exchangeStream(Stream) const noexcept override {
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0));
  }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, PretendedGuard)
} // namespace c10::impl
