"""What a chat template adds when messages follow, and whether what it wrote before stays as it was.

Nothing is assumed about a template: it is rendered over many small conversations (`probe`), and each step of each of them is
compared with the render of the whole. A join of two roles that held in every one of them is rendered from a short stand-in for
the history from then on, so that a turn costs what the turn costs; any other join is rendered in full, compared, and refused
where it changes the past.
"""

from rollout_core.multimodal.templates.additions import add, begin, generation_prompt
from rollout_core.multimodal.templates.probing import probe
from rollout_core.multimodal.templates.verdict import FEATURES, Break, Join, Verdict, both, features, formed, united

__all__ = [
    "FEATURES",
    "Break",
    "Join",
    "Verdict",
    "add",
    "begin",
    "both",
    "features",
    "formed",
    "generation_prompt",
    "probe",
    "united",
]
