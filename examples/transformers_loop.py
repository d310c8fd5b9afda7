"""Mixing in the Trainer of transformers."""

import tempfile

import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

import fastmix
from fastmix.compat.transformers import MixTrainer

classes = 4
dataset = [(torch.rand(3, 8, 8), i % classes) for i in range(16)]
folder = tempfile.mkdtemp()

sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=classes))
args = TrainingArguments(folder, max_steps=1, label_smoothing_factor=0.1, use_cpu=True, report_to="none", save_strategy="no")
samples = [{"pixel_values": x, "labels": y} for x, y in dataset]
MixTrainer(model, args, train_dataset=samples, mixer=fastmix.Mixup(0.2)).train()
