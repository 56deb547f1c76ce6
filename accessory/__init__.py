"""Fine-tuning of quantized large language models."""

import logging

# On a CPU bitsandbytes complains at import that an optional kernel, which nothing here calls, is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
