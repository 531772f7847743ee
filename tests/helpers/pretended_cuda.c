/* Preloaded, and taken for the driver's library: torch's autograd engine asks how many GPUs there are, and whether this
   process uses them. It then runs on fake CUDA tensors, where a build of torch for CUDA finds no GPU. */

int pretended_gpus = 0;

signed char _ZN3c104cuda12device_countEv(void) { return (signed char)pretended_gpus; } /* c10::cuda::device_count() */

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  (void)device;
  *flags = 0;
  *active = 0;
  return 0;
}
