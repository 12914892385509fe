"""lm-eval's local-completions. python lm_eval_client.py URL MODEL TOKENIZER '[[context, text]]'

Prints, as JSON, each text's log likelihood behind its context and whether greedy decoding says it.
"""

import json
import logging
import sys

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

if __name__ == "__main__":
    url, model, tokenizer, pairs = sys.argv[1:]
    logging.disable(logging.WARNING)
    api = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model=model, tokenizer=tokenizer,
        tokenizer_backend="huggingface", max_length=128, num_concurrent=1, max_retries=1,
    )  # fmt: skip
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=number)
        for number, pair in enumerate(json.loads(pairs))
    ]
    print(json.dumps([[float(value), bool(greedy)] for value, greedy in api.loglikelihood(asked)]))
