"""API keys that are stored hashed: ``hmad hash-key``, and a door that opens to the key and to nothing else."""

import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from fake_generator import plain_services, serving

from hmad.facts.errors import ConfigError
from hmad.facts.keys import hashed_line, load_api_keys

ROOT = Path(__file__).parent.parent
KEY = "sk-4f1c2a9e7b3d5068"


def hash_key(text: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hmad", "hash-key"]
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, check=False)


async def test_a_hashed_key_opens_and_its_hash_does_not(tmp_path: Path) -> None:
    hashed = hash_key(f"{KEY}\n")
    assert (hashed.returncode, hashed.stderr) == (0, "")
    assert KEY not in hashed.stdout
    file = tmp_path / "api.keys"
    file.write_text(f"# who has which\n{hashed.stdout}sk-another-plain-one\n")
    services = plain_services(api_key_digests=load_api_keys(file))
    async with serving(services) as address, aiohttp.ClientSession() as http:

        async def status(key: str) -> int:
            async with http.get(f"{address}/status", headers={"Authorization": f"Bearer {key}"}) as response:
                return response.status

        assert [await status(key) for key in (KEY, "sk-another-plain-one")] == [200, 200]
        line = hashed.stdout.strip()
        wrong = (line, line.removeprefix("sha256:"), KEY[:-1], KEY + "0", "sk-another", "")
        assert [await status(key) for key in wrong] == [401] * len(wrong)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "one word"),
        ("\n", "one word"),
        ("two keys-in-one-line-here", "one word"),
        ("first-key-of-a-file\nsecond-key-of-a-file", "one word"),
        ("#comment-of-a-key-file", "without #"),
        ("sha256:" + 64 * "0", "sha256: before it"),
        ("short", "can be guessed"),
    ],
)
def test_what_is_no_key_is_not_hashed(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        hashed_line(text.encode())


def test_a_mistake_is_told_without_the_key() -> None:
    told = hash_key("secret sauce")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("hmad: an API key is one word")
    assert "sauce" not in told.stderr
