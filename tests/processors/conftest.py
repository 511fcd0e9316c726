"""Real processors of transformers. What is missing here is an error, not a skip: `nox -s processors` installs it."""

from support import torchvision_cpu

torchvision_cpu.prepare()
