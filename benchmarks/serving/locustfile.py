"""What locust plays: users who each send completions one after the other, most of them streamed.

Every answer becomes a row of the JSON file that SERVEGYM_LOAD names as `output`; its other fields are `seed`,
`model`, `streamed` (share of requests) and `longest` (most prompt tokens). How long a user's prompts and
answers are follows from the seed and its number alone, so each front gets the same work.
"""

import json
import os
import random
import time
from itertools import count
from pathlib import Path

from locust import HttpUser, constant, events, task

LOAD = json.loads(os.environ["SERVEGYM_LOAD"])
LONG_SHARE = 0.2  # of the prompts; they hold up whoever decodes beside them
SHORT, OUTPUT = (16, 96), (8, 64)  # tokens
END, WORDS = 1, 1000  # the model's tokens are END..WORDS; 0 ends an answer
TIMEOUT_S = 60.0

numbers = count()
answers = []


class Reader(HttpUser):
    """A user without pauses."""

    wait_time = constant(0)

    def on_start(self):
        """The user's own sequence of requests."""
        self.rng = random.Random(f"{LOAD['seed']}-{next(numbers)}")

    @task
    def complete(self):
        """Ask for one completion and keep what came."""
        rng = self.rng
        long = rng.random() < LONG_SHARE
        prompt = rng.randint(LOAD["longest"] // 2, LOAD["longest"]) if long else rng.randint(*SHORT)
        streamed = rng.random() < LOAD["streamed"]
        body = {
            "model": LOAD["model"],
            # New words each time: what engines cached for one front would be the next one's gain.
            "prompt": [random.randint(END, WORDS) for _ in range(prompt)],
            "max_tokens": rng.randint(*OUTPUT),
            "ignore_eos": True,
            "temperature": 0,
            "stream": streamed,
        }
        if streamed:
            body["stream_options"] = {"include_usage": True}
        answer = {"streamed": streamed, "asked": body["max_tokens"], "begin": time.time(), "tokens": 0}
        answer |= {"first": None, "engine": None, "status": 0, "ended": False, "error": None}
        try:
            with self.client.post(
                "/v1/completions", json=body, stream=streamed, catch_response=True, timeout=TIMEOUT_S
            ) as response:
                answer["status"] = response.status_code
                if response.status_code == 200:
                    (read_stream if streamed else read_whole)(response, answer)
        except Exception as error:  # a cut stream is an answer like others, and is counted
            answer["error"] = type(error).__name__
        answers.append({**answer, "end": time.time()})


def read_stream(response, answer):
    """Events of one or several tokens; in the end how many there were, and `[DONE]`."""
    for line in response.iter_lines(chunk_size=None):
        if line == b"data: [DONE]":
            answer["ended"] = True
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            if event.get("choices"):
                answer["first"] = answer["first"] or time.time()
                answer["tokens"] += 1
                answer["engine"] = event["model"]
            if event.get("usage"):
                answer["tokens"] = event["usage"]["completion_tokens"]


def read_whole(response, answer):
    """All tokens at once."""
    body = response.json()
    answer["tokens"] = body["usage"]["completion_tokens"]
    answer["engine"], answer["ended"] = body["model"], True


@events.quitting.add_listener
def write(**_):
    """Leave the answers behind."""
    Path(LOAD["output"]).write_text(json.dumps(answers), encoding="utf-8")
