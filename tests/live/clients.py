#!/usr/bin/env python3
"""Use a running server through the `openai` package and numpy, as a client would.

    python clients.py --url http://127.0.0.1:8000

The last line is 'N passed, N failed'; the exit status is 1 on failure.
"""
import argparse
import base64
import io
import json
import sys
import traceback
import urllib.request

import numpy as np
import openai


def npy(text):
    return np.load(io.BytesIO(base64.b64decode(text)))


class Client:
    def __init__(self, url):
        self.url = url
        self.api = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        self.model = self.api.models.list().data[0].id

    def generate(self, body):
        request = urllib.request.Request(self.url + "/inference/v1/generate", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())

    def check_completion_rows(self):
        reply = self.api.completions.create(
            model=self.model, prompt=[5, 6, 7, 8], max_tokens=6, temperature=0, logprobs=2,
            extra_body={"routed_experts_prompt_start": 2, "ignore_eos": True})
        choice = reply.choices[0]
        rows = npy(choice.routed_experts)
        assert choice.routed_experts_start == 2, choice
        assert rows.shape[0] == 4 + 6 - 1 - 2 and rows.dtype == np.uint8, (rows.shape, rows.dtype)
        assert len(choice.logprobs.tokens) == 6 and reply.usage.completion_tokens == 6
        whole = self.generate({"token_ids": [5, 6, 7, 8], "return_routed_experts": True,
                               "sampling_params": {"max_tokens": 6, "temperature": 0, "ignore_eos": True}})
        rows_too = whole["choices"][0]["routed_experts"]
        data = np.frombuffer(base64.b64decode(rows_too["data"]), rows_too["dtype"]).reshape(rows_too["shape"])
        assert (data[2:] == rows).all()

    def check_stream_equals_whole(self):
        ask = dict(model=self.model, messages=[{"role": "user", "content": "Tell me a story about a fox."}],
                   max_completion_tokens=60, seed=7, temperature=0.8)
        whole = self.api.chat.completions.create(**ask)
        chunks = list(self.api.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content, (text, whole.choices[0].message.content)
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason

    def check_choices_and_stop(self):
        reply = self.api.completions.create(
            model=self.model, prompt="Once upon a time", n=3, max_tokens=16, seed=1, stop=["was"],
            extra_body={"return_routed_experts": True, "routed_experts_format": "object"})
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        for choice in reply.choices:
            assert "was" not in choice.text
            assert choice.routed_experts["shape"][0] > 0

    def check_errors_name_the_parameter(self):
        for extra, param in [({"routed_experts_prompt_start": -1}, "routed_experts_prompt_start"),
                             ({"top_p": 2}, "top_p"), ({"max_tokens": -1}, "max_tokens")]:
            try:
                self.api.completions.create(model=self.model, prompt="x", extra_body=extra)
            except openai.BadRequestError as error:
                assert error.param == param, error
            else:
                raise AssertionError(f"{extra} was accepted")
        try:
            self.api.completions.create(model="nobody", prompt="x")
        except openai.NotFoundError:
            return
        raise AssertionError("an unknown model was accepted")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    client = Client(parser.parse_args().url)
    checks = [getattr(client, name) for name in dir(client) if name.startswith("check_")]
    failed = 0
    for check in checks:
        try:
            check()
        except Exception:
            failed += 1
            print(f"{check.__name__} failed")
            traceback.print_exc()
    print(f"{len(checks) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
