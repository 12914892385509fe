"""Tiny bases of several families and a byte tokenizer, built in memory, saved once per run."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # read when Triton is imported, as transformers and PEFT do
    os.environ["TRITON_INTERPRET"] = "1"

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

VOCABULARY = 261  # 256 bytes, then <|end|> and four chat markers
CONTEXT = 128
_COMMON = {
    "vocab_size": VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
_LLAMA_LIKE = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_FALCON = {
    **_COMMON,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_T5 = {
    **_COMMON,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "decoder_start_token_id": 256,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_LLAMA_LIKE),
    "qwen3": lambda: transformers.Qwen3Config(**_LLAMA_LIKE, head_dim=16, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**_LLAMA_LIKE, sliding_window=9),
    "gpt2": lambda: transformers.GPT2Config(
        **_COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT
    ),
    "gemma": lambda: transformers.GemmaConfig(**_LLAMA_LIKE, head_dim=16),
    "opt": lambda: transformers.OPTConfig(
        **_COMMON,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        word_embed_proj_dim=32,
    ),
    "phi": lambda: transformers.PhiConfig(**_LLAMA_LIKE, qk_layernorm=True),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_LLAMA_LIKE,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **_LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_LLAMA_LIKE, head_dim=16, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **_LLAMA_LIKE | {"num_key_value_heads": 4},
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_LLAMA_LIKE, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=9
    ),
    "bloom": lambda: transformers.BloomConfig(**_COMMON, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: transformers.FalconConfig(
        **_FALCON, num_kv_heads=2, new_decoder_architecture=True
    ),
    "falcon_alibi": lambda: transformers.FalconConfig(**_FALCON, alibi=True, multi_query=False),
    "falcon_multi_query": lambda: transformers.FalconConfig(**_FALCON, multi_query=True),
    "gptj": lambda: transformers.GPTJConfig(
        **_COMMON, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=CONTEXT
    ),
    "mpt": lambda: transformers.MptConfig(
        **_COMMON, d_model=32, n_layers=2, n_heads=4, max_seq_len=CONTEXT
    ),
    "gemma2": lambda: transformers.Gemma2Config(**_LLAMA_LIKE, head_dim=16, sliding_window=9),
    "t5": lambda: transformers.T5Config(**_T5, num_layers=2, tie_word_embeddings=False),
    "mt5": lambda: transformers.MT5Config(**_T5, num_layers=2, feed_forward_proj="gated-gelu"),
    "bart": lambda: transformers.BartConfig(
        **_COMMON,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=CONTEXT,
        decoder_start_token_id=256,
        forced_eos_token_id=None,
    ),
    "recurrent_gemma": lambda: transformers.RecurrentGemmaConfig(
        **_COMMON,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        lru_width=32,
    ),
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_configure(config: pytest.Config) -> None:
    # Here, since pytest imports it. PEFT tells what it does with a base; the tests look at the
    # result.
    config.addinivalue_line("filterwarnings", "ignore::peft.PeftWarning")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What failed is told at once, since a run that is cut off comes to no summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid}, {report.when}:\n{report.longreprtext}", flush=True)


def byte_tokenizer(opening: str | None = None) -> Any:
    """Every byte is a token, so any text round-trips and half characters occur.

    `opening`, one of the special tokens, is put in front of every text, as a bos_token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    if opening is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{opening} $A", special_tokens=[(opening, core.token_to_id(opening))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=opening,
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


def closing_tokenizer(opening: str | None) -> Any:
    """One that closes each text with its end token, and opens it, as encoders' do."""
    tokenizer = byte_tokenizer()
    single = f"{opening or ''} $A <|end|>".strip()
    special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in single.split() if t != "$A"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=special
    )
    return tokenizer


def make_base(family: str, folder: Path, seed: int = 0) -> Path:
    """A base of that family with random weights large enough that tokens differ."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    auto: Any = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    model = auto.from_config(config)
    # T5's own weights are that large, and its attention divides by nothing.
    scale = 1 if "t5" in family else 6
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = 256
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the base of a family, made at first use."""
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = make_base(family, tmp_path_factory.mktemp(family))
        return made[family]

    return base


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Threads on tiny matrices only fight for the cores, which other tests may be using."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A real S3 endpoint on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Makes a fresh bucket; the AWS variables point at the endpoint."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")

    def make() -> str:
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        client: Any = boto3.client("s3", region_name="us-east-1", endpoint_url=s3_endpoint)
        client.create_bucket(Bucket=name)
        return f"s3://{name}/prefix"

    return make


@dataclass(frozen=True)
class RayCluster:
    """A cluster in a process of its own. `env` is what a caller needs to be let in."""

    address: str
    dashboard: str
    env: dict[str, str]
    process: subprocess.Popen[str]

    def order(self, what: str) -> None:
        """Have it done, as tests/ray_nodes.py reads it: "add CPUS", "kill NUMBER", …"""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        done = any(line.startswith("done: ") for line in self.process.stdout)
        assert done, f"the cluster ended instead of: {what}"


@contextmanager
def running_cluster(*cpus: int) -> Iterator[RayCluster]:
    """A cluster with a node for each number of CPUs, which asks for a token: the one of our own
    environment if there is one."""
    token = os.environ.get("RAY_AUTH_TOKEN") or uuid.uuid4().hex
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    with subprocess.Popen(
        [sys.executable, Path(__file__).parent / "ray_nodes.py", *map(str, cpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **secret},
    ) as process:
        assert process.stdout is not None
        where = next((line for line in process.stdout if line.startswith("{")), None)
        assert where is not None, "the cluster did not start; its error is above"
        yield RayCluster(**json.loads(where), env=secret, process=process)
        process.communicate(timeout=60)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """Two nodes, started once."""
    with running_cluster(6, 6) as cluster:
        yield cluster
