"""A plain FastAPI loop around a float network, which serving.py measures: NETWORK PORT."""

import sys

import torch
import uvicorn
from fastapi import FastAPI, Request

from biper_engine.cli.sources import random_network
from biper_engine.conversion.twin import float_twin
from biper_engine.preprocessing import image_to_tensor, open_image

app = FastAPI()
model = random_network(sys.argv[1])
twin = float_twin(model, torch.zeros(2, *model.metadata.input_size))
twin = twin.to(memory_format=torch.channels_last)


@app.post("/predict")
async def predict(request: Request) -> dict[str, list[float]]:
    image = image_to_tensor(open_image(await request.body()), model.metadata)
    with torch.inference_mode():
        shares = twin(image[None].to(memory_format=torch.channels_last))[0].softmax(1)[0]
    values, indices = shares.topk(5)
    return {"classes": indices.tolist(), "probabilities": values.tolist()}


if __name__ == "__main__":
    print(f"http://127.0.0.1:{sys.argv[2]}/", flush=True)
    uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", access_log=False)
