"""Ray Serve LLM's own code fetches a shard directory, as for a request that names the adapter.

    python tests/ray_serve_lora.py SHARDS OUT

Needs an environment of its own: pip install "ray[serve]==2.60.0" boto3 pyarrow "moto[server]". No
vLLM, no cluster: what runs is Ray's LLMConfig, its lookup and its download, against moto's S3
server. SHARDS goes up with boto3; OUT is what the replica would hand to vLLM as the adapter's path.
"""

import asyncio
import os
import sys
from pathlib import Path

BUCKET, ADAPTER = "loras", "mine-v1"


async def fetch(config, out: Path, adapter: str):
    from ray.llm._internal.serve.utils.lora_serve_utils import LoraModelLoader

    return await LoraModelLoader(lora_root=str(out)).load_model_from_config(
        f"{config.model_id}:{adapter}", config
    )


def main() -> None:
    shards, out = (Path(argument).absolute() for argument in sys.argv[1:])
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    import boto3
    from ray.llm._internal.common.utils.lora_utils import get_lora_model_ids

    # What ray.serve.llm calls LLMConfig; that module itself imports vLLM.
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=BUCKET)
    for file in shards.iterdir():
        s3.upload_file(str(file), BUCKET, f"{ADAPTER}/{file.name}")
    config = LLMConfig(
        model_loading_config={"model_id": "glm", "model_source": "/models/glm"},
        lora_config={"dynamic_lora_loading_path": f"s3://{BUCKET}"},
        engine_kwargs={"enable_lora": True, "enable_expert_parallel": True},
    )
    print("models:", get_lora_model_ids(f"s3://{BUCKET}", config.model_id))
    loaded = asyncio.run(fetch(config, out, ADAPTER))
    print("vLLM gets:", loaded.model_id, loaded.local_path, loaded.lora_assigned_int_id)
    print("files:", sorted(os.listdir(loaded.local_path)))
    server.stop()


if __name__ == "__main__":
    main()
