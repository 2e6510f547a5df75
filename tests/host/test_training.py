"""Other people's training loops and generation, on hosted models."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from kilobayes import host, tree
from kilobayes.adapters import LoRA
from kilobayes.host import KilobayesConfig

from .tiny import batch, close, config, make

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


class Rows(torch.utils.data.Dataset):
    """Sequences whose class is that of their first token."""

    def __init__(self, count: int) -> None:
        gen = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 64, (count, 6), generator=gen)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids = self.ids[row]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 3}


def arguments(folder, **options) -> TrainingArguments:
    common = {
        "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 6, "report_to": [],
        "seed": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "max_steps": 48,
        "lr_scheduler_type": "constant", "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **common | options)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("stack", [1, 2])
def test_trainer_trains_and_saves(stack, tmp_path):
    torch.manual_seed(0)
    adapter = LoRA(r=4, dropout=0.05)
    model = get_peft_model(make("bert"), KilobayesConfig(adapter=adapter, stack=stack, task_type="SEQ_CLS"))
    start = tree.clone(host.read(model))
    trainer = Trainer(model, arguments(tmp_path, max_steps=150), train_dataset=Rows(48))
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 0.75 * found[0], found
    for key, leaf in host.read(model).items():
        assert (leaf - start[key]).detach().flatten(1).abs().amax(1).min() > 0, key
    trainer.save_model(str(tmp_path / "end"))
    again = PeftModel.from_pretrained(make("bert"), tmp_path / "end")
    inputs = batch("bert")
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


def test_trainer_resumes_where_it_stopped(tmp_path):
    def trainer(folder):
        base = make("roberta")
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model = get_peft_model(base, KilobayesConfig(adapter=LoRA(r=2), stack=2, task_type="SEQ_CLS"))
        options = arguments(folder, max_steps=8, save_strategy="steps", save_steps=4)
        return Trainer(model, options, train_dataset=Rows(32))

    whole = trainer(tmp_path / "a")
    whole.train()
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    theirs = host.read(whole.model)
    for key, leaf in host.read(resumed.model).items():
        close(leaf, theirs[key], 1e-6)


def test_trainer_with_checkpointing_of_activations(tmp_path):
    model = get_peft_model(make("llama"), KilobayesConfig(stack=2, task_type="SEQ_CLS"))
    options = arguments(tmp_path, gradient_checkpointing=True, max_steps=60)
    trainer = Trainer(model, options, train_dataset=Rows(32))
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 0.8 * found[0], found


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(60))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset

    text = [{"text": " ".join(f"w{(start + step) % 20}" for step in range(12))} for start in range(20)]
    options = trl.SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=40, learning_rate=2e-2,
        logging_steps=5, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no",
        lr_scheduler_type="constant", bf16=False, max_length=16, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        make("llama_lm"),
        args=options,
        train_dataset=Dataset.from_list(text),
        processing_class=tokenizer(),
        peft_config=KilobayesConfig(adapter=LoRA(r=8), target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 0.6 * found[0], found


@pytest.mark.parametrize("kind", ["llama_lm", "gpt2_lm", "t5_seq2seq"])
def test_generation(kind):
    model, inputs = get_peft_model(make(kind), config(kind)).eval(), batch(kind, left=True)
    inputs.pop("decoder_input_ids", None)
    asked = inputs | {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    tokens = model.generate(**asked)
    assert tokens.shape[0] == 4
    with model.disable_adapter():
        base = model.generate(**asked)
    assert base.shape != tokens.shape or not torch.equal(base, tokens)
    assert torch.equal(model.merge_and_unload().generate(**asked), tokens)
