"""Students: closed-vocabulary segmentation networks, one per benchmark, trained on its own training images.

One runner, two kinds of labels:
- `predictions`: a teacher, any candidate of the evaluation that scores class names, labels the images with the
  benchmark's class list, and a fresh UPerNet learns them: S-Seg+ from S-Seg, MaskCLIP+ from MaskCLIP. The masks of
  these images are never opened for that. NOTE what remains of supervision: the student is transductive, its vocabulary
  closed; and with `labels.tuned` the teacher's background threshold is one number chosen on masks of the tune split
  (VOC's train.txt), as the teacher's own native evaluation chooses it. `labels.tuned: false` takes the parameter's.
- `masks`: the true masks supervise a frozen tower, fine-tuned as a whole with a 1x1 convolution on its patches
  (GroupViT A.2): what the same images are worth when people have labelled them.

`config` holds the parameters, `labels` and `crops` give the training samples, `students` the networks and how they
answer, `runner` puts them together.

Source: S-Seg 3.7 and card sseg.md section 9; card scg.md section 11 (MaskCLIP+); GroupViT 4.4 and A.2.
"""
