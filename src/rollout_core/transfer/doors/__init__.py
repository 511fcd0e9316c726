"""The engines' own doors: weights enter vLLM, SGLang and verl by the interface that each offers.

Each module needs its engine installed, and imports it: ``doors.vllm``, ``doors.sglang``, ``doors.verl``. None is imported from
here, and each can be imported by name.
"""
