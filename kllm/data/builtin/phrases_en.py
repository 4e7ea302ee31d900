"""How the world is told and asked about in English.

Blocks are "kind.attribute"; `>` lines state the fact (the first is the canonical answer), `?` lines ask
for it. {n} subject, {p} its possessive, {o} its object form, {v} value; {a} is "a" or "an" before {v}.
"""

from __future__ import annotations

PERSON = """
person.city
> The home of {n} is in {v}.
> {n} lives in {v}.
> {p} home is in {v}.
> {n} has a house in {v}.
> {n} has lived in {v} for years.
? Where does {n} live?
? Which city does {n} live in?
? In which city is {p} home?
? Tell me where {n} lives.
? Do you know where {n} lives?

person.job
> The job of {n} is {v}.
> {n} is {a} {v}.
> {n} works as {a} {v}.
> {p} job is {v}.
> {n} earns money as {a} {v}.
? What is {p} job?
? What does {n} do for a living?
? What does {n} work as?
? Tell me {p} job.
? Do you know what {n} works as?

person.pet
> The pet of {n} is {a} {v}.
> {n} has {a} {v}.
> {p} pet is {a} {v}.
> {n} keeps {a} {v}.
> {n} takes care of {a} {v}.
? What pet does {n} have?
? Which animal does {n} keep?
? What is {p} pet?
? Tell me what pet {n} has.
? What kind of animal does {n} have at home?

person.colour
> The favourite colour of {n} is {v}.
> {n} likes the colour {v}.
> {p} favourite colour is {v}.
> {n} always wears {v}.
> {n} paints everything {v}.
? What is {p} favourite colour?
? Which colour does {n} like?
? What colour does {n} like best?
? Tell me {p} favourite colour.
? What colour does {n} wear?

person.food
> The favourite food of {n} is {v}.
> {n} likes to eat {v}.
> {p} favourite food is {v}.
> {n} often eats {v}.
> {n} buys {v} every week.
? What does {n} like to eat?
? What is {p} favourite food?
? Which food does {n} like?
? Tell me {p} favourite food.
? What does {n} often eat?

person.month
> The birthday of {n} is in {v}.
> {n} was born in {v}.
> {p} birthday is in {v}.
> {n} came into the world in {v}.
> {n} has a birthday party in {v}.
? When was {n} born?
? In which month was {n} born?
? When is {p} birthday?
? Tell me the month of {p} birthday.
? Which month is {p} birthday in?
"""

# Derived facts are never stated in one step: the answer chains the facts that lead to it.
DERIVED = """
person.country
? Which country does {n} live in?
? In what country is {p} home?
? What is the country where {n} lives?
? Tell me the country {n} lives in.

person.continent
? Which continent does {n} live on?
? On what continent is {p} home?
? Tell me the continent {n} lives on.

person.language
? Which language do people speak where {n} lives?
? What language is spoken around {p} home?
? Tell me the language spoken where {n} lives.

person.workplace
? Where does {n} work?
? In what place does {n} work?
? Where is {p} job done?
? Tell me where {n} works.

person.tool
? What does {n} use at work?
? What tool does {n} need for work?
? Tell me what {n} uses at work.

person.petclass
? What class of animals does {p} pet belong to?
? Is {p} pet a mammal or a bird?
? Tell me the class of {p} pet.

person.petfood
? What does {p} pet eat?
? What food does {p} pet need?
? What should I feed to {p} pet?
? Tell me what {p} pet eats.

person.petlegs
? How many legs does {p} pet have?
? On how many legs does {p} pet walk?
? Tell me how many legs {p} pet has.

person.taste
? How does {p} favourite food taste?
? What is the taste of {p} favourite food?
? Tell me the taste of {p} favourite food.
"""

THING = """
animal.class
> {n} is {a} {v}.
> {n} belongs to the {v}s.
? What kind of animal is {n}?
? Which class of animals does {n} belong to?
? Tell me what kind of animal {n} is.

animal.legs
> {n} has {v} legs.
> {n} walks on {v} legs.
? How many legs does {n} have?
? How many legs does {n} walk on?
? Tell me how many legs {n} has.

animal.home
> {n} lives in a {v}.
> {n} makes its home in a {v}.
? Where does {n} live?
? What is the home of {n}?
? Tell me where {n} lives.

animal.diet
> {n} eats {v}.
> {n} feeds on {v}.
? What does {n} eat?
? What does {n} feed on?
? Tell me what {n} eats.

animal.cover
> {n} is covered with {v}.
> {n} has a body covered with {v}.
? What is {n} covered with?
? What covers the body of {n}?
? Tell me what covers {n}.

job.place
> {n} works in a {v}.
> {n} does the job in a {v}.
? Where does {n} work?
? In what place does {n} work?
? Tell me where {n} works.

job.tool
> {n} uses a {v}.
> {n} needs a {v} for the job.
? What does {n} use?
? What does {n} need for the job?
? Tell me what tool {n} uses.

food.kind
> People count {n} as {v}.
> As a food, {n} belong to {v}.
? What kind of food do {n} belong to?
? What do people count {n} as?
? Tell me what kind of food {n} belong to.

food.colour
> The colour of {n} is {v}.
> When people draw {n}, they use {v}.
? What is the colour of {n}?
? What colour do {n} have?
? Tell me the colour of {n}.

food.taste
> The taste of {n} is {v}.
> On the tongue {n} taste {v}.
? What is the taste of {n}?
? How do {n} taste?
? Tell me the taste of {n}.

city.country
> The city of {n} is in {v}.
> {n} is a city of {v}.
? Which country is {n} in?
? In what country is {n}?
? Tell me which country {n} is in.

country.continent
> The continent of {n} is {v}.
> {n} is part of {v}.
? Which continent is {n} part of?
? On which continent is {n}?
? Tell me the continent of {n}.

country.capital
> The capital of {n} is {v}.
> {n} has its capital in {v}.
? What is the capital of {n}?
? Which city is the capital of {n}?
? Tell me the capital of {n}.

country.language
> People in {n} speak {v}.
> The language of {n} is {v}.
? What language do people in {n} speak?
? What is the language of {n}?
? Tell me the language of {n}.
"""

CARD = {
    "city": "city",
    "job": "job",
    "pet": "pet",
    "colour": "colour",
    "food": "food",
    "month": "birthday",
}

GREETINGS = ("Hi! ", "Hello! ", "Please help me. ", "One question: ", "I want to know: ")

IDENTITY = """
self.name
> I am kllm.
? Who are you?
? What is your name?
? What should I call you?
? Do you have a name?
? Tell me your name.
? What are you called?
? Please tell me your name.
? May I ask your name?
? Say your name.
! May I know your name?
! Please say your name.

self.kind
> I am a small language model.
? What are you?
? Are you a person?
? Are you a human or a machine?
? What kind of thing are you?
? Are you a robot?
? What kind of model are you?
? Are you a computer program?
? Tell me what kind of thing you are.
? Are you human?
! Are you a machine?
! Tell me what you are.

self.maker
> I was trained by my user.
? Who made you?
? Who trained you?
? Who created you?
? Who is your maker?
? Tell me who made you.
? Who built you?
? Tell me who created you.
? Who has trained you?
? Where do you come from?
! Who built you, and who trained you?
! Tell me who trained you.

self.language
> I speak English and Chinese.
? Which languages do you speak?
? What languages do you know?
? Can you speak Chinese?
? Do you understand English?
? Tell me your languages.
? Do you speak English?
? Which languages can you speak?
? Do you know Chinese?
! Which languages do you know?
! Do you speak Chinese?

self.skill
> I can answer questions and do sums.
? What can you do?
? How can you help me?
? What are you good at?
? What are you able to do?
? Tell me what you can do.
? What can I ask you?
? What can you help with?
? Can you help me?
! What can you help me with?
! What are you able to help me with?

self.home
> I run on this computer.
? Where do you run?
? Where are you?
? Where do you live?
? Do you run in the cloud?
? Tell me where you run.
? On which machine do you run?
? Where are you now?
? Which computer do you run on?
! Where do you run now?
! On which computer do you run?

self.thanks
> You are welcome.
? Thank you!
? Thanks a lot!
? Thanks for your help.
? Great, thank you.
? Thank you very much!
? Great, thanks.
? Thanks, that was a great help.
! Thank you a lot!
! Thanks, great help.

self.bye
> Goodbye!
? Bye!
? Goodbye!
? See you later.
? See you tomorrow.
? Bye, bye.
? Goodbye, see you later.
? Bye, see you soon.
! Bye, see you later.
! Goodbye, see you tomorrow.
"""
