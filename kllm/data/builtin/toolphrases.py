"""What the built-in tool data says: questions for the tools, answers without one, and words to play with."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Sums of two numbers by operator; {e} sums are written out with their operators.
SUMS = {
    "en": {
        "+": (
            "What is {a}+{b}?",
            "What is {a} + {b}?",
            "How much is {a} plus {b}?",
            "Add {a} and {b}.",
            "Calculate {a}+{b}.",
            "Please work out {a} plus {b}.",
            "{a}+{b}=?",
        ),
        "-": (
            "What is {a}-{b}?",
            "What is {a} - {b}?",
            "How much is {a} minus {b}?",
            "Subtract {b} from {a}.",
            "Calculate {a}-{b}.",
            "Please work out {a} minus {b}.",
            "{a}-{b}=?",
        ),
        "*": (
            "What is {a}*{b}?",
            "What is {a} * {b}?",
            "How much is {a} times {b}?",
            "Multiply {a} by {b}.",
            "Calculate {a}*{b}.",
            "Please work out {a} times {b}.",
            "{a}×{b}=?",
        ),
        "/": (
            "What is {a}/{b}?",
            "How much is {a} divided by {b}?",
            "Divide {a} by {b}.",
            "Calculate {a}/{b}.",
            "{a}÷{b}=?",
        ),
        "e": ("What is {e}?", "Calculate {e}.", "Please work out {e}.", "How much is {e}?", "{e}=?"),
        "3": ("What is the sum of {a}, {b} and {c}?", "Add {a}, {b} and {c}.", "How much is {a}+{b}+{c}?"),
        "then": {
            "+": ("And plus {b}?", "Now add {b}."),
            "-": ("And minus {b}?", "Now subtract {b}."),
            "*": ("And times {b}?", "Now multiply it by {b}."),
        },
    },
    "zh": {
        "+": (
            "{a}+{b}等于多少？",
            "{a} + {b} 等于多少？",
            "{a}加{b}是多少？",
            "请计算{a}+{b}。",
            "请算一下{a}加{b}。",
            "{a}与{b}的和是多少？",
            "{a}+{b}=？",
        ),
        "-": (
            "{a}-{b}等于多少？",
            "{a} - {b} 等于多少？",
            "{a}减{b}是多少？",
            "请计算{a}-{b}。",
            "请算一下{a}减{b}。",
            "从{a}里减去{b}是多少？",
            "{a}-{b}=？",
        ),
        "*": (
            "{a}*{b}等于多少？",
            "{a} * {b} 等于多少？",
            "{a}乘以{b}是多少？",
            "请计算{a}*{b}。",
            "请算一下{a}乘以{b}。",
            "{a}与{b}的积是多少？",
            "{a}×{b}=？",
        ),
        "/": (
            "{a}/{b}等于多少？",
            "{a}除以{b}是多少？",
            "请计算{a}/{b}。",
            "请算一下{a}除以{b}。",
            "{a}÷{b}=？",
        ),
        "e": ("{e}等于多少？", "请计算{e}。", "帮我算一下{e}。", "{e}是多少？", "{e}=？"),
        "3": ("{a}、{b}和{c}的和是多少？", "{a}加{b}再加{c}是多少？", "{a}+{b}+{c}是多少？"),
        "then": {
            "+": ("再加{b}呢？", "再加上{b}是多少？"),
            "-": ("再减{b}呢？", "再减去{b}是多少？"),
            "*": ("再乘以{b}呢？", "再乘以{b}是多少？"),
        },
    },
}

ECHO = {"en": ("Repeat {x}.", "Say {x}.", "Copy {x}."), "zh": ("重复{x}。", "请说{x}。", "照抄{x}。")}
RESULT = {"en": "The result is {x}.", "zh": "结果是{x}。"}
MISSING = {"en": "I have no tool for that.", "zh": "我没有做这件事的工具。"}
ZERO = {"en": "That has no result: division by zero.", "zh": "没有结果：除数是零。"}
FAILED = {"en": "The tool failed, so I do not know.", "zh": "工具出错了，我不知道结果。"}
FAILURES = (
    "error: not run: the tools took more than 30 s",
    "error: the code ran for more than 10 s",
    "error: out of memory",
    "error: the tool is not there at the moment",
)

# Tasks on a list of numbers: questions in both languages, and the Python that answers them; {x} is the list.
LISTS = {
    "sort": (
        ("Sort the numbers {x}.", "Sort {x}.", "Put {x} in ascending order."),
        ("把{x}从小到大排序。", "请给{x}排序。", "将{x}从小到大排列。"),
        "sorted({x})",
    ),
    "down": (
        ("Sort {x} from largest to smallest.", "Put {x} in descending order."),
        ("把{x}从大到小排序。", "将{x}从大到小排列。"),
        "sorted({x}, reverse=True)",
    ),
    "sum": (
        ("What is the sum of the list {x}?", "Sum up {x}.", "Add up all of {x}."),
        ("{x}的总和是多少？", "把{x}全部加起来。", "求{x}的总和。"),
        "sum({x})",
    ),
    "max": (
        ("Which is the largest of {x}?", "What is the maximum of {x}?", "Find the largest number in {x}."),
        ("{x}里最大的是哪个？", "{x}的最大值是多少？", "找出{x}里最大的数。"),
        "max({x})",
    ),
    "min": (
        ("Which is the smallest of {x}?", "What is the minimum of {x}?", "Find the smallest number in {x}."),
        ("{x}里最小的是哪个？", "{x}的最小值是多少？", "找出{x}里最小的数。"),
        "min({x})",
    ),
    "reverse": (
        ("Reverse the list {x}.", "Turn {x} around.", "Write {x} backwards."),
        ("把{x}倒过来。", "将{x}反转。", "把{x}倒着写。"),
        "{x}[::-1]",
    ),
    "square": (
        ("Square each of {x}.", "What are the squares of {x}?"),
        ("求{x}中每个数的平方。", "{x}的平方分别是多少？"),
        "[n * n for n in {x}]",
    ),
    "double": (
        ("Double each of {x}.", "Multiply each of {x} by two."),
        ("把{x}中每个数翻倍。", "{x}中每个数的两倍是多少？"),
        "[2 * n for n in {x}]",
    ),
    "even": (
        ("Which of {x} are even?", "Keep the even numbers of {x}."),
        ("{x}里哪些是偶数？", "留下{x}里的偶数。"),
        "[n for n in {x} if n % 2 == 0]",
    ),
    "count": (
        ("How many numbers are in {x}?", "Count the numbers {x}.", "How long is the list {x}?"),
        ("{x}里有几个数？", "数一数{x}有多少个数。", "列表{x}有多长？"),
        "len({x})",
    ),
}

# Tasks on one word; {w} is the word, {c} a letter in it.
TEXTS = {
    "length": (
        ("How many letters does {w} have?", "How long is the word {w}?", "What is the length of {w}?"),
        ("{w}有几个字母？", "单词{w}有多长？", "{w}的长度是多少？"),
        "len('{w}')",
    ),
    "backwards": (
        ("Reverse the word {w}.", "Spell {w} backwards.", "Write the word {w} backwards."),
        ("把单词{w}倒过来写。", "{w}倒过来怎么写？", "反转{w}。"),
        "'{w}'[::-1]",
    ),
    "upper": (
        ("Write {w} in capital letters.", "Put {w} into upper case.", "Convert {w} to upper case."),
        ("把{w}写成大写。", "{w}的大写是什么？", "将{w}变成大写。"),
        "'{w}'.upper()",
    ),
    "letter": (
        ("How many times is {c} in {w}?", "Count the letter {c} in {w}.", "How often does {w} have {c}?"),
        ("{w}里有几个{c}？", "数一数{w}里的{c}。", "{w}中{c}出现几次？"),
        "'{w}'.count('{c}')",
    ),
    "repeat": (
        ("Repeat the word {w} {n} times.", "Write {w} {n} times."),
        ("把{w}重复{n}次。", "将{w}写{n}遍。"),
        "'{w}' * {n}",
    ),
}

# Tasks on several words; {x} is a list of them, {s} the same joined by hyphens.
PHRASES = {
    "alphabet": (
        ("Sort the words {x}.", "Put the words {x} in alphabetical order."),
        ("把单词{x}按字母顺序排列。", "请给单词{x}排序。"),
        "sorted({x})",
    ),
    "join": (
        ("Join the words {x} with hyphens.", "Put hyphens between the words {x}."),
        ("用连字符连接单词{x}。", "在单词{x}之间加上连字符。"),
        "'-'.join({x})",
    ),
    "split": (
        ("Split {s} at the hyphens.", "Cut {s} into its parts."),
        ("按连字符拆开{s}。", "把{s}拆成几部分。"),
        "'{s}'.split('-')",
    ),
    "longest": (
        ("Which is the longest of the words {x}?", "Find the longest word in {x}."),
        ("单词{x}里最长的是哪个？", "找出{x}里最长的单词。"),
        "max({x}, key=len)",
    ),
    "words": (
        ("How many words are in {x}?", "Count the words {x}."),
        ("{x}里有几个单词？", "数一数{x}有多少个单词。"),
        "len({x})",
    ),
}

# Questions for the clock: what they ask for, and the answers.
CLOCK = {
    "en": {
        "time": (("What time is it?", "What is the time now?", "Tell me the time."), "It is {time}."),
        "date": (("What is the date?", "What date is it today?", "Tell me the date."), "It is {date}."),
        "day": (("What day is it today?", "Which weekday is it?"), "It is {day}."),
        "place": (("What time is it in {place}?", "Tell me the time in {place}."), "It is {time}."),
    },
    "zh": {
        "time": (("现在几点？", "现在是什么时间？", "请告诉我时间。"), "现在是{time}。"),
        "date": (("今天是几月几号？", "今天的日期是什么？", "请告诉我日期。"), "今天是{date}。"),
        "day": (("今天星期几？", "今天是星期几？"), "今天是{day}。"),
        "place": (("{place}现在几点？", "请告诉我{place}的时间。"), "现在是{time}。"),
    },
}
DAYS = (
    *("Monday/星期一", "Tuesday/星期二", "Wednesday/星期三", "Thursday/星期四"),
    *("Friday/星期五", "Saturday/星期六", "Sunday/星期日"),
)
# Places without summer time: the same offset all year.
PLACES = {
    "Tokyo/东京": ("Asia/Tokyo", "+09:00"),
    "Shanghai/上海": ("Asia/Shanghai", "+08:00"),
    "Seoul/首尔": ("Asia/Seoul", "+09:00"),
    "Bangkok/曼谷": ("Asia/Bangkok", "+07:00"),
    "Delhi/德里": ("Asia/Kolkata", "+05:30"),
    "Moscow/莫斯科": ("Europe/Moscow", "+03:00"),
    "Nairobi/内罗毕": ("Africa/Nairobi", "+03:00"),
}

# A made-up word is two or three of these and now and then a last letter: 75 of them, because a small model
# that copies finds its place by what came before, and syllables that come again in every prompt mislead it.
SYLLABLES = tuple(first + vowel for first in "bdfghklmnprstvz" for vowel in "aeiou")
ENDINGS = ("", "", "l", "n", "r", "s")
WORDS = _words("""
    air angle answer arch autumn bag ball basket bell bench bicycle blanket blossom bottle branch bridge
    bucket button cable candle canoe canyon carpet castle ceiling cellar chain chair circle clock cloud coast
    coffee comet copper corner cotton cradle crystal curtain dawn desk diamond dinner dolphin dragon dream
    drum eagle earth echo elbow engine evening feather fence finger flame flower forest fountain galaxy
    garage ginger glacier glove guitar hallway harvest hat helicopter horizon igloo island ivory jacket jewel
    journey jungle kangaroo kettle keyboard kingdom kite ladder lantern leaf lemonade letter lighthouse
    lightning magnet mango maple marble market meadow melon mirror moon morning mountain museum needle
    night notebook number ocean office olive opera orchard orchid oyster paper parade pebble pencil pepper
    piano picture pillow planet pocket poem postcard potato pumpkin puzzle python quarter question quilt
    rain rainbow razor ribbon river rocket rope sailor salad sand scissors shadow silver skate snow sofa
    spoon square star stone storm street string sugar summer sunset table tailor teapot temple thunder ticket
    tiger tomato tower train travel treasure trumpet tulip tunnel umbrella uncle vacuum valley vanilla velvet
    village violin volcano wagon walnut water weather whale whistle wind window winter wizard wool yellow
    yesterday yogurt zebra zigzag
    """)
