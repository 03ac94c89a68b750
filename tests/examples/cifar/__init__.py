"""The accuracy benchmark on CIFAR, on pictures of a hundred classes."""

WORDS = (
    "--regime cifar100-10000 --teacher resnet8 --validation 100 --images 200 --epochs 3 --views 2 "
    "--student resnet8 --width 8 --templates 8 --subclasses 1 --components 9 --batch-size 50 "
    "--width-parameters 9 --width-macs 8.5 --iekd-epochs 1"
)
OPTIONS = WORDS.split()
