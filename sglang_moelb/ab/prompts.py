"""Questions and passages of the demo workload. The passages are our own words."""

from __future__ import annotations

IMAGE_QUESTIONS = (
    "What is in this picture?",
    "Describe this image in two sentences.",
    "Which colours stand out here, and where?",
    "Is there any text in the image? If so, read it out.",
    "How many separate objects can you count?",
    "Was this taken indoors or outdoors? Say what makes you think so.",
    "What would you ask the person who took this picture?",
    "Give this picture a short title.",
)

MULTI_IMAGE_QUESTIONS = (
    "What do these pictures have in common?",
    "Which of these pictures is the brightest, and which has the finest detail?",
    "Order these images from the smallest to the largest thing shown.",
    "Describe each picture in one sentence, in the order given.",
)

TEXT_QUESTIONS = (
    "Why does bread rise?",
    "Name three uses of a lever.",
    "What makes a good question?",
    "Explain tides to a child.",
    "Write a short note that thanks a neighbour for watering the plants.",
    "How would you sort a pile of letters by hand?",
    "What is the difference between a mean and a median?",
    "Suggest a name for a small bakery near a harbour.",
)

PASSAGE_TASKS = (
    "Summarise the following in one sentence.",
    "List the facts in the following text.",
    "Which claim in the following text is hardest to check, and why?",
    "Write a title for the following text.",
)

PASSAGES = (
    "A mixture of experts keeps many small networks side by side and lets a router pick a few of "
    "them for every token. Most of the parameters rest while a token passes, so the model can be "
    "large and still answer quickly. The price is paid in traffic. When the experts live on "
    "different machines, every token has to travel to the ones it was given and back again. If "
    "the router likes some experts better than others, their machine works while the rest wait, "
    "and the whole layer takes as long as the busiest one.",
    "The harbour wall was built in three winters, when the farms had no work to give. Each stone "
    "came down from the quarry on a sledge, and each family kept a count of its loads on a stick. "
    "When the wall was done the sticks were laid in the foundation of the light at its end. Two "
    "centuries later a storm took the light, and the sticks floated into the market square, where "
    "people who had never heard the story stood and counted the notches.",
    "Water expands a little when it is warmed and a lot when it boils, but it also grows when it "
    "freezes, which few liquids do. Ice therefore floats, and a lake freezes from the top. Fish "
    "spend the winter in the dense water near the bottom, at about four degrees. Were ice heavier "
    "than water, lakes would fill with it from below, and spring would find them solid.",
    "To time a program fairly, run both versions on the same machine, take turns between them, and "
    "repeat. Report the spread along with the average, because a difference smaller than the "
    "spread is no difference. Write down what else was running. Throw the first run away, since "
    "caches are cold. And before making anything faster, measure how much of the whole it is.",
    "Bees tell one another where flowers are by dancing on the comb. The angle of the dance to the "
    "vertical is the angle of the flowers to the sun, and its length is the distance. Since the "
    "hive is dark, the others follow by touch. As the sun moves, a dancer that stays inside turns "
    "her dance with it, so she must carry a clock, and no one has yet found all its parts.",
)
