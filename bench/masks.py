"""What a grammar adds to decoding, without a server and clients on the same CPUs.

`python -m bench.masks`: answers of one sequence, each in turn without a grammar, by a JSON schema, by any
JSON object and by a regular expression, in one process; greedy, then drawn. The figures are milliseconds of a
step, without that of the first token; of two answers that are compared, the steps at the same places.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from statistics import median
from time import perf_counter

from headstart.engine.core.chunking import Chunking
from headstart.engine.core.engine import CoreEngine
from headstart.engine.kinds import engine_kind
from headstart.model_files import embedded_model
from headstart.numerics import DEFAULT
from headstart.prompt.tokenizer import load_tokenizer
from headstart.protocol import EngineSettings, Finished, Sampling, Submit
from headstart.service.generation.grammars import OBJECT, json_grammar, regex_grammar

ANSWER = 96
CHUNK, CTX = 64, 1024
PROMPT = "<|im_start|>user\nInvent people, as JSON.<|im_end|>\n<|im_start|>assistant\n"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "email": {"type": "string", "format": "email"},
        "role": {"enum": ["reader", "writer", "owner"]},
    },
    "required": ["name", "age", "email", "role"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 20}
GRAMMARS = {
    "none": "",
    "schema": json_grammar(PEOPLE, "schema"),
    "any object": json_grammar(OBJECT, "schema"),
    "regex": regex_grammar("([A-Z][a-z]{2,10} [A-Z][a-z]{2,10}, [0-9]{2} years\\n){40}"),
}


class Bench:
    def __init__(self, model: str, threads: int) -> None:
        settings = EngineSettings(model, 1, CTX, threads, CHUNK, numerics=DEFAULT)
        self.engine = CoreEngine(engine_kind(model).load(settings), Chunking(CHUNK), lambda: None)
        self.prompt = load_tokenizer(model).encode(PROMPT)

    def round(self, temperature: float) -> dict[str, list[float]]:
        return {name: list(self.steps(grammar, temperature)) for name, grammar in GRAMMARS.items()}

    def steps(self, grammar: str, temperature: float) -> Iterator[float]:
        """Steps in which a token after the first one comes."""
        sampling = Sampling(temperature=temperature, seed=1, grammar=grammar)
        self.engine.handle(Submit(1, self.prompt, max_tokens=ANSWER, sampling=sampling))
        n_steps = 0
        while True:
            started = perf_counter()
            events = self.engine.step()
            n_steps += bool(events)
            if n_steps > 1:
                yield 1000 * (perf_counter() - started)
            if any(isinstance(event, Finished) for event in events):
                return


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.masks", description=__doc__)
    parser.add_argument("--model", default="", help="a GGUF file; else the embedded model")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    chosen = parser.parse_args()
    bench = Bench(chosen.model or embedded_model(), chosen.threads)
    for temperature in (0.0, 0.8):
        rounds = [bench.round(temperature) for _ in range(1 + chosen.rounds)]
        # The first one waits for the vocabulary.
        del rounds[0]
        print(f"temperature {temperature}")
        for name in list(GRAMMARS)[1:]:
            ratios = [_ratio(each[name], each["none"]) for each in rounds]
            print(f"    {name}: ratio {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def _ratio(steps: list[float], plain: list[float]) -> float:
    # Later steps attend to more, so an answer that ends early must not be compared with a whole one.
    n = min(len(steps), len(plain))
    return median(steps[:n]) / median(plain[:n])


if __name__ == "__main__":
    main()
