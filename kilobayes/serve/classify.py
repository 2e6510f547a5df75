"""``/predict``: texts in, labels and how sure they are out."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import torch
from fastapi import Request

from kilobayes.errors import KilobayesError
from kilobayes.metrics import conformal
from kilobayes.predict import Predictive
from kilobayes.serve.answers import Service
from kilobayes.serve.bodies import Predict
from kilobayes.serve.pool import Row, rows_of
from kilobayes.workflows.data import reads
from kilobayes.workflows.evaluate import prediction_rows
from kilobayes.workflows.finetune import Fitted


class Predictions:
    """Answers requests for a label."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._thresholds: dict[tuple[str, float], float] = {}

    async def __call__(self, request: Request) -> dict[str, Any]:
        """The record of each text, as ``kilobayes predict`` writes it, and whether to abstain."""
        service = self.service
        asked = await service.body(request, Predict)
        name = service.chosen(asked.model, service.shelf.classifiers, "classifiers")
        most = service.limits.max_queue
        if len(asked.given) > most:
            raise KilobayesError(f"a request holds at most {most} texts", f"found {len(asked.given)}")
        fitted = service.shelf.fitted(name)
        rows, examples, cut = await service.aside(lambda: self._encoded(fitted, asked))
        service.metrics.tokens.labels("read").inc(sum(len(ids) for row in rows for ids in row.ids))
        job = service.put(lambda: service.engine.ask(name, rows))
        scores = await service.until(request, asyncio.wrap_future(job.future))

        def told() -> list[dict[str, Any]]:
            predictive = Predictive(torch.stack(scores, dim=1))
            records = list(prediction_rows(fitted.card.classes, predictive, examples))
            self._doubt(name, fitted, asked, records, predictive.probs.numpy())
            return records

        return {
            "model": name,
            "samples": len(scores[0]),
            "truncated": cut,
            "results": await service.aside(told),
        }

    def _encoded(self, fitted: Fitted, asked: Predict) -> tuple[list[Row], Any, int]:
        if fitted.card.task != "choice" and asked.texts is None:
            raise KilobayesError("this model takes texts", "found rows", 'as in {"texts": ["a text"]}')
        kinds = {isinstance(text, tuple) for text in asked.texts or ()}
        if asked.texts and kinds != {fitted.card.paired}:
            two = "pairs of texts" if fitted.card.paired else "single texts"
            raise KilobayesError(f"this model was trained on {two}", "found others")
        if asked.coverage is not None or asked.max_error is not None:
            self._check(fitted)
        examples = reads(fitted.card)(asked.given, need_labels=False)
        encoded = fitted.encode(examples)
        if fitted.card.task == "choice" and encoded.counts is None:  # others of the run may have options
            every = torch.full((len(encoded),), len(fitted.card.classes))
            encoded = dataclasses.replace(encoded, counts=every)
        return rows_of(encoded), examples, encoded.truncated

    def _check(self, fitted: Fitted) -> None:
        conformal.needed()
        samples = next(p.samples for p in self.service.shelf.pools if fitted in p.fitted)
        if samples not in (None, fitted.card.samples):
            raise KilobayesError(
                f"the run's calibration rows were seen with {fitted.card.samples} samples",
                f"it is served with {samples}", "serve it without --samples",
            )  # fmt: skip
        fitted.held()

    def _doubt(
        self, name: str, fitted: Fitted, asked: Predict, records: list[dict[str, Any]], probs: np.ndarray
    ) -> None:
        """Sets, acceptance and abstention, in place.

        To abstain is to accept the label no more, or, without a limit on errors, to have a set of none or of
        several labels.
        """
        if asked.coverage is not None:
            inside = conformal.sets(fitted.held(), probs, asked.coverage, asked.sets)
            for record, own in zip(records, inside):
                record["set"] = [c for c, is_in in zip(fitted.card.classes, own) if is_in]
                record["abstain"] = len(record["set"]) != 1
        if asked.max_error is not None:
            key = (name, asked.max_error)
            if key not in self._thresholds:
                self._thresholds[key] = conformal.threshold(fitted.held(), asked.max_error)
            for record, best in zip(records, probs.max(axis=1)):
                record["accepted"] = bool(best >= self._thresholds[key])
                record["abstain"] = not record["accepted"]
