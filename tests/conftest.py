"""Every test sees eight virtual CPU devices, so that one process can compare a mesh of one with a mesh of eight."""

import atexit
import gc
import json
import os
import shutil
import signal
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

# Before the first import of jax, which reads them once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The programs of the tests are small, so that compiling them takes most of the time. It takes a quarter of it without
# optimization and with the older code generator, which left jaxlib in 0.11.
flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    flags.append("--xla_cpu_use_fusion_emitters=false")
for flag in flags:
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

# Compiled programs outlast the run, so that a second one on the same machine takes a fraction of the time. Commands
# that tests start find them, too, and leave nothing in the home directory.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="isheep_jax_cache_")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# A shell in the background, or nohup, ignores some signals, and all processes that tests start would inherit it.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# A process may have 65,530 memory maps on Linux, and a compiled program takes several; XLA crashes when none is left.
MANY_MAPS = 30_000


# Their tests start whole runs. Last, they would keep one worker busy while the others have nothing left.
FIRST = ("test_distributed.py", "test_train.py", "test_library.py", "test_meshes.py", "test_supervise.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go():
    """Programs of earlier test files are dropped when there are many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        import jax

        from isheep_jax.decode.programs import clear_programs

        clear_programs()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory) -> Path:
    """A Hugging Face directory with a random Llama of two layers and a tokenizer of single characters."""
    import jax
    from architectures import small
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    from isheep_jax.checkpoint.hf_save import save_checkpoint
    from isheep_jax.model.architecture import init_parameters
    from isheep_jax.text.tokenizer import Tokenizer as ModelTokenizer

    directory = tmp_path_factory.mktemp("small")
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocabulary = {piece: i for i, piece in enumerate(special + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    tokenizer_directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(tokenizer_directory / "tokenizer.json"))
    (tokenizer_directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "<|end|>",
                "unk_token": "<unk>",
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
    architecture = small(vocab_size=128, intermediate_size=64, context_length=512, bos_token_id=1, eos_token_ids=(2, 6))
    params = init_parameters(architecture, jax.random.key(0))
    save_checkpoint(directory / "model", params, architecture, ModelTokenizer.load(tokenizer_directory), card=None)
    return directory / "model"


@pytest.fixture
def serve(monkeypatch):
    """Starts stand-ins for an OpenAI-compatible server: `serve(answer).url`; failed attempts are repeated at once."""
    import threading

    from chat_stand_in import Server

    from isheep_jax import chat_server, distributed

    monkeypatch.setattr(chat_server, "PAUSES", (0.01, 0.01))
    # As between processes, what the first one found travels as JSON.
    monkeypatch.setattr(distributed, "from_primary", lambda make: json.loads(json.dumps(make())))
    servers = []

    def start(answer) -> Server:
        servers.append(Server(answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
