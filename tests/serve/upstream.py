"""A stand-in for a server that has several LoRA adapters: plain PEFT, OpenAI's completions, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request
from peft import PeftModel
from starlette.responses import JSONResponse
from transformers import AutoModelForCausalLM, AutoTokenizer


class Upstream:
    """Serves the folders beside a manifest by their names; remembers what it was asked."""

    def __init__(self, base: Path, samples: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        folders = sorted(path.parent for path in samples.glob("*/adapter_config.json"))
        self.model: Any = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), str(folders[0]), adapter_name=folders[0].name
        ).eval()
        for folder in folders[1:]:
            self.model.load_adapter(str(folder), adapter_name=folder.name)
        self.asked: list[dict[str, Any]] = []
        self.fault = 0
        self.app = FastAPI()
        self.app.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        self.app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)

    @torch.no_grad()
    def log_probs(self, name: str, ids: list[int]) -> torch.Tensor:
        """``(T, V)``: of what follows each token."""
        self.model.set_adapter(name)
        return self.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def top(self, row: torch.Tensor, count: int) -> dict[str, float]:
        values, tokens = row.topk(min(count, len(row)))
        names = self.tokenizer.convert_ids_to_tokens(tokens.tolist())
        return {f" {name}": float(value) for name, value in zip(names, values)}

    async def completions(self, request: Request) -> Any:
        asked = await request.json()
        self.asked.append(asked)
        if self.fault:
            return JSONResponse({"error": {"message": "no such adapter"}}, status_code=self.fault)
        ids = self.tokenizer(asked["prompt"])["input_ids"]
        gen = torch.Generator().manual_seed(asked.get("seed", 0))
        start = len(ids)
        for _ in range(asked["max_tokens"]):
            row = self.log_probs(asked["model"], ids)[-1]
            hot = asked.get("temperature", 1.0)
            token = torch.multinomial((row / hot).softmax(-1), 1, generator=gen) if hot else row.argmax()
            ids.append(int(token))
        shown = ids if asked.get("echo") else ids[start:]
        words = [
            f" {word}" if at else word for at, word in enumerate(self.tokenizer.convert_ids_to_tokens(ids))
        ]
        words = words[len(ids) - len(shown) :]
        choice: dict[str, Any] = {"index": 0, "text": "".join(words), "finish_reason": "length"}
        if "logprobs" in asked:
            rows = self.log_probs(asked["model"], ids)
            first = len(ids) - len(shown)
            places = [len("".join(words[:at])) for at in range(len(words))]
            choice["logprobs"] = {
                "tokens": words,
                "token_logprobs": [
                    float(rows[at - 1][ids[at]]) if at else None for at in range(first, len(ids))
                ],
                "top_logprobs": [self.top(rows[at - 1], asked["logprobs"]) for at in range(first, len(ids))],
                "text_offset": places,
            }
        return {"choices": [choice]}

    async def chat(self, request: Request) -> Any:
        asked = await request.json()
        self.asked.append(asked)
        text = self.tokenizer.apply_chat_template(
            asked["messages"], add_generation_prompt=True, tokenize=False
        )
        row = self.log_probs(asked["model"], self.tokenizer(text)["input_ids"])[-1]
        listed = [{"token": t, "logprob": v} for t, v in self.top(row, asked["top_logprobs"]).items()]
        content = [listed[0] | {"top_logprobs": listed}]
        return {"choices": [{"index": 0, "finish_reason": "length", "logprobs": {"content": content}}]}
