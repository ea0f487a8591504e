"""What stands in for what a reader has and a test has not, for each `sh` block of the pages."""

from __future__ import annotations

from sh_blocks import ON_A_CPU, Recipe

# Three rows of a few tokens, and as many different ones as a benchmark wants.
THREE = """
cat > prompts.jsonl <<'END'
{{"id": "sea", "prompt": "Once upon a time, in a village by the sea,", "max_tokens": 8}}
{{"id": "tea", "prompt": "Tea is", "max_tokens": 8}}
{{"id": "old", "prompt": "The oldest city in the world is", "max_tokens": 8}}
END
rm -f answers.parquet
"""
IDS = ["sea", "tea", "old"]
# Behind them one that nobody can decode, as in a night of thousands.
BAD_ROW = """echo '{{"id": "bad", "prompt": ""}}' >> prompts.jsonl
"""
MANY = "python jobs/make_prompts.py 200 > prompts.jsonl"
FEW_TOKENS = {"--png": "--max-tokens 16 --png"}
BUCKET = {"s3://my-bucket": "s3://{bucket}"}

RECIPES = {
    "readme_speed": Recipe(
        "README.md",
        ("trbatch bench speed",),
        instead={"--model NAME": "--model {tiny}", **FEW_TOKENS},
        before=MANY,
    ),
    "readme_pip": Recipe("README.md", ("pip install .",)),
    "formats_pip": Recipe(
        "docs/formats.md",
        ("pip install '.[tokenizers]'",),
        before=THREE,
        after="trbatch submit prompts.jsonl --dry-run --json > preview.json\npip freeze > frozen",
    ),
    "formats_push": Recipe(
        "docs/formats.md", ("trbatch collect JOB --push",), instead={"JOB": "{job}"}
    ),
    "nightly_cron": Recipe(
        "docs/nightly.md",
        ("job=$(trbatch submit prompts.jsonl",),
        instead={"s3://bucket/answers.parquet": "s3://{bucket}/answers.parquet || code=$?"},
        beside=("trbatch worker",),
        before=f"{THREE}{BAD_ROW}code=0\ntrbatch worker --device cpu",
        after="[ $code -eq 3 ]",
    ),
    "operations_dashboard": Recipe(
        "docs/operations.md", ("python3 -m venv dashboard",), elsewhere="test_rq_tools.py"
    ),
    "operations_exporter": Recipe(
        "docs/operations.md", ("python3 -m venv exporter",), elsewhere="test_rq_tools.py"
    ),
    "performance_acceptance": Recipe(
        "docs/performance.md",
        ("measure() {",),
        instead={
            "--max-tokens 256": "--max-tokens 16",
            "--train-tokens 256": "--train-tokens 16",
            "measure 80,16,8,4": "measure 8,4",
        },
        before="python jobs/make_prompts.py 12 > test.jsonl\n"
        "python jobs/make_prompts.py 20 | tail -8 > rest.jsonl",
    ),
    "performance_speed": Recipe(
        "docs/performance.md",
        ("python jobs/make_prompts.py 2000",),
        instead={
            "--batch 1,8,32,64,128,256 --max-tokens 256": "--batch 1,8 --max-tokens 16",
            "--as-shape llama-8b --json": "--json",  # eight billion weights
        },
    ),
    "performance_scripts": Recipe(
        "docs/performance.md",
        ("python docs/measurements/scripts/steps.py",),
        instead={
            "--batch 32 --tree-size 8,32": (
                "--batch 2 --tree-size 4 --limit 3 --max-tokens 8 --json parted.json"
            ),
            "--rows 2000 --max-tokens 128": "--rows 6 --max-tokens 8 --json jobs.json",
            "--rows 1000 --batch 128 --size 1,8 --repeat 5": (
                '--rows 9 --batch 4 --repeat 1 --model "$TRBATCH_MODEL"'
            ),
        },
        without_gpu={"--idle 32": "--idle 32 || [ $? -eq 2 ]"},  # it says that it needs one
        before=MANY,
    ),
    "quickstart_install": Recipe(
        "docs/quickstart.md",
        ("git clone URL trbatch",),
        instead={"URL": "{url}"},
        after=f"{THREE}trbatch run prompts.jsonl -o answers.parquet\ncp answers.parquet ..",
    ),
    "security_acl": Recipe(
        "docs/security.md",
        ('sed -e "s/REPLACE-client-password',),
        instead={
            "/etc/redis/users.acl": "{folder}/users.acl",
            "@queue.example:6379/0": "@localhost:{port}/0?ssl_ca_certs={folder}/ca.pem",
        },
        before="CLIENT={client} WORKER={worker}",
        after="touch written; until [ -e started ]; do sleep 0.1; done\ntrbatch status --json",
    ),
    "storage_hosts": Recipe(
        "docs/storage.md",
        ("pip install '.[worker,s3]'", "trbatch worker --gpu 0"),
        instead={
            **BUCKET,
            "rediss://…": "redis://trbatch:PASSWORD@127.0.0.1:{port}/0",
            "AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… AWS_DEFAULT_REGION=…": "{credentials}",
            "https://minio.example": "{s3}",
        },
        without_gpu={"--gpu 0": "--device cpu"},
        beside=("trbatch worker",),
        before=THREE,
    ),
    "tuning_speed": Recipe(
        "docs/tuning.md", ("trbatch bench speed",), instead=FEW_TOKENS, before=MANY
    ),
    "workers_one_machine": Recipe(
        "docs/workers.md",
        ("trbatch worker --gpu 0",),
        without_gpu=ON_A_CPU,
        beside=("trbatch worker",),
        before=f"{THREE}trbatch submit prompts.jsonl --name shared --chunk-size 1",
        after="trbatch wait shared\n"
        "for try in $(seq 60); do\n"
        '    [ $(trbatch status --json | grep -o \'"state":"idle"\' | wc -l) -ge 3 ] && break\n'
        "    sleep 0.2\ndone\n"
        "trbatch collect shared -o answers.parquet",
    ),
    "workers_many_machines": Recipe(
        "docs/workers.md",
        ("pip install '.[worker,s3]'", "trbatch worker --gpu all --model"),
        instead={
            **BUCKET,
            "rediss://trbatch:PASSWORD@queue.example:6379/0": (
                "redis://trbatch:PASSWORD@127.0.0.1:{port}/0"
            ),
            "meta-llama/Llama-3.1-8B-Instruct": "smollm2-135m-instruct",
        },
        without_gpu={"--gpu all": "--device cpu"},
        beside=("trbatch worker",),
        before=THREE,
    ),
}
