"""Chat templates as data: what real ones do, one oddity at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

#: modality -> what the template writes for one medium of it.
Shown = Mapping[str, str]


class TemplateCase(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A chat template.

    A message is ``header`` (with ``@`` for its role), its content, ``end`` and ``separator``. ``stops``: the tokens with which a
    policy ends its turn; the separator is never sampled. ``prompt``: what the generation prompt has beyond the header, which the
    template writes in a history too. ``system``: a system message that is written where none is given. ``stable``: whether it
    never changes what it wrote before, whatever follows.
    """

    name: str = "chatml"
    header: str = "<|im_start|>@\n"
    end: str = "<|im_end|>"
    separator: str = "\n"
    stops: tuple[str, ...] = ("<|im_end|>",)
    prompt: str = ""
    system: str = ""
    needs_user: bool = False
    strips_thinking: bool = False
    groups_tools: bool = False
    numbers_media: bool = False
    counts_media: bool = False
    media_first: bool = False
    trims: bool = False
    tool_media: bool = True
    stable: bool = True

    def render(self, messages: Sequence[Mapping[str, Any]], shown: Shown, *, generation: bool = False) -> str:
        """The text of a conversation. ``ValueError`` for messages that the template refuses."""
        if self.needs_user and not any(message["role"] == "user" for message in messages):
            raise ValueError("No user query found in messages.")
        parts = []
        if self.counts_media:
            parts.append(f"{sum(_media(message) for message in messages)} media\n")
        if self.system and messages[0]["role"] != "system":
            parts.append(self._wrapped("system", self.system))
        seen = 0
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        for place, message in enumerate(messages):
            role = message["role"]
            content = self._content(message, shown, seen)
            seen += _media(message)
            if role == "assistant":
                if self.strips_thinking and place < last_user:
                    content = content.rpartition("</think>")[2].lstrip("\n")
                content = (
                    self.prompt + content + "".join(f"[call {call['function']['name']}]" for call in message.get("tool_calls", ()))
                )
            if role == "tool" and self.groups_tools:
                first = place == 0 or messages[place - 1]["role"] != "tool"
                last = place == len(messages) - 1 or messages[place + 1]["role"] != "tool"
                parts.append((self.header.replace("@", "user") if first else "\n") + f"<tool>{content}</tool>")
                parts.append(self.end + self.separator if last else "")
            else:
                parts.append(self._wrapped(role, content))
        if generation:
            parts.append(self.header.replace("@", "assistant") + self.prompt)
        return "".join(parts)

    def _wrapped(self, role: str, content: str) -> str:
        return self.header.replace("@", role) + content + self.end + self.separator

    def _content(self, message: Mapping[str, Any], shown: Shown, seen: int) -> str:
        content = message.get("content") or ""
        if isinstance(content, str):
            return content.strip() if self.trims else content
        parts = list(content)
        if self.media_first:  # videos, then everything else but text, then text
            parts.sort(key=lambda part: {"video": 0, "text": 2}.get(part["type"], 1))
        texts = []
        for part in parts:
            if part["type"] == "text":
                texts.append(part["text"].strip() if self.trims else part["text"])
                continue
            if part["type"] not in shown:
                raise ValueError(f"Unexpected item type in content: {part['type']}")
            if message["role"] == "tool" and not self.tool_media:
                raise ValueError("Tool messages hold text only.")
            seen += 1
            texts.append((f"Picture {seen}: " if self.numbers_media else "") + shown[part["type"]])
        return "".join(texts)


def _media(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    return sum(part["type"] != "text" for part in content) if isinstance(content, list) else 0


_GLM: Final = {"header": "<|@|>\n", "end": "", "separator": "", "stops": ("<|user|>", "<|tool|>")}
#: By name, the plainest first.
TEMPLATES: Final[dict[str, TemplateCase]] = {
    case.name: case
    for case in (
        TemplateCase(),
        TemplateCase(name="no-separator", separator=""),
        TemplateCase(name="glm", **_GLM),  # type: ignore[arg-type]
        TemplateCase(name="system", system="You are helpful."),
        TemplateCase(name="needs-user", needs_user=True),
        TemplateCase(name="thinks", prompt="<think>\n"),
        TemplateCase(name="numbered", numbers_media=True),
        TemplateCase(name="media-first", media_first=True),
        TemplateCase(name="trims", trims=True),
        TemplateCase(name="text-tools", tool_media=False),
        TemplateCase(name="strips-thinking", strips_thinking=True, stable=False),
        TemplateCase(name="groups-tools", groups_tools=True, stable=False),
        TemplateCase(name="counts-media", counts_media=True, stable=False),
        TemplateCase(name="plain-end", header="@:\n", end="\n\n", separator="", stops=(), stable=False),
    )
}
#: Control tokens that these templates write.
CONTROLS: Final = ("<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
