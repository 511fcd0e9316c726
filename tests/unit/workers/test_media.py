"""Which of a prompt's pictures go to an engine with data (clause W8): against one that only keeps them."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from rollout_core.errors import WorkerError
from rollout_core.multimodal import Conversation, Picture
from rollout_core.workers import SamplingParams
from rollout_core.workers.link.hosts import Spec
from rollout_core.workers.media import decode_picture, decode_tensors, encode_picture, encode_tensors
from rollout_core.workers.worker import Worker
from support.worlds import PICTURE_WORLD

FOUR = SamplingParams(response_length=4)
