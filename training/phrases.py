"""Wordings of requests, questions and small talk that the embedded default learns from.

The phrasings of `anygen eval` are other ones, written independently of these; a test keeps them apart. Slots: {x} what
is asked for, {X} the same with a capital, {y} another thing, {n} a name, {p} and {q} plurals, {s} a style, {b} a
background, {m} a motion.
"""

from anygen.training.icons import TRAINED_STYLES

ASK = (
    "draw", "Draw", "please draw", "can you draw", "could you draw", "draw me", "show me", "show", "paint",
    "paint me",
    "sketch", "make", "make me", "create", "generate", "produce", "design", "render", "illustrate", "give me",
    "I want",
    "I'd like", "I would like to see", "I need", "let me see", "can you show me", "could you please make",
    "please create",
    "would you draw", "can I see", "may I have", "I wish to see", "go ahead and draw", "now draw", "try to draw",
    "just",
    "how about", "what about", "let's see", "visualize", "depict", "quickly sketch", "send me", "we need",
)  # fmt: skip
NOUN = (
    "a picture of", "an image of", "a drawing of", "an icon of", "an illustration of", "a sketch of", "a painting of",
    "some art of", "a photo of", "a graphic of", "an emoji of", "a nice picture of", "one picture of", "the image of",
    "a cute drawing of", "artwork showing", "a picture with", "a picture that shows", "a little icon showing",
)  # fmt: skip
TAIL = (
    "", "", "", "", "", " please", ", please", ", thanks", " for me", " for my kid", " for my website", " now",
    ", would you?", " if you can", " for a card", ", thank you!", " for my blog", " right away",
    " for a presentation",
)  # fmt: skip
WHOLE = (
    "{x}", "{x}, please", "picture: {x}", "image of {x}", "draw: {x}", "{x} - can you draw that?", "{X}.",
    "I have never seen {x}. Show me one.", "My daughter loves {x}. Can you draw it for her?",
    "For my presentation I need {x}.", "What would {x} look like? Draw it.", "Imagine {x} and draw it.",
    "Today I want to look at {x}", "Could I get {x}?", "Do you know how to draw {x}?", "Please visualise {x} for me.",
    "Surprise me with {x}!", "{X}? Show me!", "I was thinking of {x}. Paint it.", "Give us {x} on the screen.",
    "Hello! Please draw {x}.", "Hi, can you make {x}?", "It is raining and I am bored, draw me {x}.",
    "My teacher asked for a picture with {x}.", "Let there be {x}", "A picture with {x} in it, please.",
    "generate image {x}", "create an image: {x}", "i need an icon, {x}", "can u draw {x}", "pls draw {x}",
    "Would it be possible to see {x}?", "Make a sticker with {x}.", "Put {x} into a picture.", "Illustrate this: {x}",
    "Produce artwork. Subject: {x}.", "The picture should show {x}.", "I'd love to see {x}!", "{x}, drawn",
)  # fmt: skip
PAIR = (
    "Draw {x} and then {y}.", "Show me {x}, then show me {y}.", "I want two pictures: {x} and {y}.",
    "First {x}, after that {y}.", "Make one picture of {x} and another one of {y}.", "Draw {x}. Also draw {y}.",
    "Please create a picture of {x} and a separate picture of {y}.", "Can you draw {x} and also {y}, each by itself?",
    "Two images please, one with {x}, one with {y}.", "paint {x}, and next {y}", "{X} first and {y} second, please.",
    "Give me a drawing of {x} followed by a drawing of {y}.", "draw both: {x} and {y}",
    "Let me see {x} and then {y}.",
)  # fmt: skip
NAME_IT = (
    "What is this?", "what is it", "What do you see?", "What is shown here?", "Name this.", "Identify the object.",
    "What's in the picture?", "Can you tell me what this is?", "What does the image show?", "Which thing is this?",
    "Do you recognise this?", "What am I looking at?", "Tell me what is in this image.", "What is that called?",
    "and this?",
    "Look at this. What is it?", "Who or what is this?", "Please name the thing in this picture.", "what's this", "",
)  # fmt: skip
DESCRIBE = (
    "Describe this picture.", "Describe the image.", "Write a caption.", "Give me a caption for this.",
    "What does this picture look like?", "Tell me everything about this image.", "Explain what you see in detail.",
    "Caption this image, please.", "How would you describe this?", "Describe it with style and background.",
)  # fmt: skip
ASK_STYLE = (
    "Which style is this drawn in?",
    "What is the style of this picture?",
    "In what style is it drawn?",
    "style?",
)
ASK_GROUND = (
    "What is the background?", "What colour is the background?", "Where is it?", "What is behind it?",
    "Which background does the picture have?", "What color is behind the object?",
)  # fmt: skip
ASK_COUNT = (
    "How many are there?",
    "How many things are in the picture?",
    "Count them.",
    "how many?",
    "How many do you see?",
)
AGAIN = (
    "Draw this again", "Draw the same thing", "Make me another one of these", "Redraw this", "Draw it once more",
    "Show me one like this", "Now you draw it", "Can you draw this", "Make a picture like this", "Draw what you see",
)  # fmt: skip
AGAIN_JOINTS = ("{}, {}", "{}, {}", "{}. {}")
"""A request to make it again, and a change."""
CHANGE_THING = (
    "now make it {x}", "Now draw {x} instead.", "Change it to {x}.", "And now {x}?", "Make it {x}", "now {x}",
    "Replace it with {x}.", "I would rather have {x}.", "Can it be {x} instead?", "the same but with {x}",
)  # fmt: skip
CHANGE_STYLE = (
    "now in the {s} style", "Make it {s}.", "Can I have it in {s} style?", "Use the {s} style instead.",
    "and in {s}?",
)  # fmt: skip
CHANGE_GROUND = (
    "now put it {b}", "Place it {b}.", "Same thing {b}, please.", "Can it be {b}?", "and {b}?",
    "Change the background: {b}",
)  # fmt: skip
CHANGE_COUNT = ("now {n} of them", "Draw {n}.", "Make it {n}.", "I want {n} of these.", "and with {n}?")
CANNOT = {
    "image": ("Draw {x}.", "Show me a picture of {x}.", "Paint {x} for me.", "I want {x} on paper."),
    "video": ("Make a video of {x}.", "Show me a clip of {x} moving.", "Animate {x}.", "I want a short film with {x}."),
    "audio": (
        "Let me hear {x}.",
        "Play the sound of {x}.",
        "What does {x} sound like? Play it.",
        "Make a noise like {x}.",
    ),
    "smell": ("Let me smell {x}.", "What does {x} smell like? Let me smell it.", "Make the smell of {x}."),
    "taste": ("Let me taste {x}.", "Cook {x} for me so that I can taste it.", "Give me the taste of {x}."),
    "thing": ("Print {x} in 3D.", "Build me a real {n}.", "Send me {x} by post.", "Bring me {x} to touch."),
}
"""What is asked for -> requests for it; none of these is made where the model has no such modality."""
CANNOT_NOUN = {
    "image": "pictures",
    "video": "videos",
    "audio": "sounds",
    "smell": "smells",
    "taste": "tastes",
    "thing": "things",
}

PLAIN = (
    "What is {x}?", "Tell me a fact about {p}.", "Where can I buy {x}?", "Why do people like {p}?",
    "Write a poem about {p}.",
    "How much does {x} cost?", "How do you spell {n}?", "Translate {n} into French.", "What is the history of {p}?",
    "Write a short story about {x}.", "What rhymes with {n}?", "Is {x} dangerous?", "How do I learn to draw {p}?",
    "Who was the first person to paint {p}?", "What is the plural of {n}?", "Give me three facts about {p}.",
    "Explain {p} to a child.", "What colours do artists use for {p}?", "Compare {p} and {q}.",
    "What is {x} used for?",
    "How are {p} made?", "Which is better, {p} or {q}?", "List five words about {p}.", "Can you define {n}?",
    "What do {p} and {q} have in common?", "Do you like {p}?", "Have you ever seen {x}?", "What does {n} mean?",
    "I have {x} at home.", "My friend has {x}.", "I drew {x} yesterday.", "I saw a picture of {x} today.",
    "What makes a good picture of {x}?", "How can I take better photos of {p}?", "Which painter is famous for {p}?",
    "Describe {x} in words.", "Tell me about {p} without any picture.", "Write an essay on {p}.",
    "Give me a recipe with {p}.",
)  # fmt: skip
PLAIN_FIXED = (
    "Hello!", "Hi", "Hey there", "Good morning", "How are you?", "Who are you?", "What can you do?", "Thanks!",
    "Thank you.",
    "Bye", "See you later", "What is the capital of France?", "What is the capital of Japan?", "What is 2 + 2?",
    "What is 17 times 3?", "Tell me a joke.", "What is your name?", "Who wrote Hamlet?", "What is gravity?", "ok",
    "How far is the moon?", "What day comes after Monday?", "Write a haiku.", "I am tired.", "I feel sad today.",
    "Can you help me?", "What is photosynthesis?", "Why is the sky blue?", "What is the largest ocean?", "yes", "no",
    "Write a Python function that adds two numbers.", "Solve x + 3 = 7.", "Summarise the plot of Romeo and Juliet.",
    "What should I cook tonight?", "Give me some advice.", "How old is the earth?", "What is an LLM?", "Define love.",
    "Who painted the Mona Lisa?", "What is a good way to learn drawing?",
    "What is the difference between art and craft?",
    "Which colours mix to green?", "How does a camera work?", "What is a pixel?", "Who invented photography?",
    "Draw a conclusion from these facts: it rains and the street is wet.", "Paint dries slowly, why?",
    "Show me how to solve 3x = 12.", "Show your work: 12 * 12.",
    "Picture this: you win a million. What would you do?",
    "Make a list of fruits.", "Create a plan for my week.", "Generate three names for a cat.", "Give me a quote.",
    "Illustrate your point with an example in words.", "Sketch an outline for an essay.", "Design a workout plan.",
    "Make me laugh.", "Show me the way to Paris in words.", "Write a caption for my holiday.", "I need a friend.",
)  # fmt: skip

GREET = (
    "Hello", "Hi", "Hello there", "Good morning", "Good afternoon", "Good day",
    "Greetings", "Welcome back", "Howdy", "Yo", "Hiya", "Morning", "Evening",
)  # fmt: skip
PART = (
    "Bye", "Goodbye", "Bye bye", "Sleep well", "See you", "See you soon", "See you tomorrow", "So long",
    "Talk to you later", "Have a nice day", "Have a good one", "Take care", "Until next time", "Good bye for now",
    "I have to go", "I am off to bed", "That is all for today", "Catch you later", "Farewell", "Enjoy your evening",
)  # fmt: skip
REPLY = (
    "Thanks", "Thank you", "Thank you so much", "Great", "Nice", "Cool", "Wow", "Perfect", "Well done",
    "Good job", "I see", "Okay", "Fine", "Sure", "Right", "Never mind", "Sorry", "Yes please", "No thanks", "Maybe",
    "I like it", "That is beautiful", "I love it", "Not bad", "Really", "You are welcome", "Congratulations", "Oh",
    "What do you mean", "Why", "Who", "Tell me more", "Go on", "I don't know", "I understand", "That was fun",
)  # fmt: skip
SMALL = (
    "How are you today", "What's up", "Nice to meet you", "How was your day",
    "Are you there", "Do you have a name", "Where are you from",
    "What are you doing", "Can we talk", "I am bored", "I am happy", "I am hungry", "It is late", "It is raining",
    "I had a long day", "Do you sleep", "What do you like", "Can you keep a secret", "Tell me about yourself",
    "What languages do you speak", "I missed you", "Long time no see", "Do you know me", "My name is Sam",
)  # fmt: skip
NAMES = ("", "", "", "", " friend", " my friend", " everyone", " anygen", " Anna", " Tom", " buddy", " again")

ASK_CLIP = (
    "make a video of", "make a clip of", "show me a clip of", "show me a video of", "film", "animate",
    "I want a video of",
    "create an animation of", "create a short film of", "generate a video of", "give me a clip of", "please animate",
    "let me watch", "let me see a film of", "can you film", "could you animate", "can you make a video with",
    "produce a short clip of", "render a video of", "I would like to watch", "I need a clip with", "now film",
    "shoot a video of", "please make a short video of", "record", "play a video of", "show a moving picture of",
)  # fmt: skip
WHOLE_CLIP = (
    "video: {x}", "clip of {x}", "animation: {x}", "{x}, as a video", "{x}, animated please", "a short film of {x}",
    "Can you show me in a video how it goes: {x}?", "I want to watch {x}.", "For my channel I need a clip of {x}.",
    "Hello! Please make a video of {x}.", "generate video {x}", "pls animate {x}", "a gif of {x}", "make a gif: {x}",
    "I have never seen {x} on film. Show me.", "Surprise me with a clip of {x}!", "How about a little movie of {x}?",
    "Bring this to life: {x}", "It should move: {x}", "moving pictures of {x}, please",
)  # fmt: skip
ASK_SOUND = (
    "let me hear", "play", "play me", "make the sound of", "I want to hear", "play the sound of", "can I hear",
    "could you play", "generate the sound of", "create an audio clip of", "give me the sound of", "please play",
    "I would like to listen to", "let me listen to", "make a sound like", "produce audio of", "record", "now play",
    "I'd like to hear", "imitate", "show me how it sounds:", "sing or play", "I need the sound of",
    "make it sound like",
)  # fmt: skip
WHOLE_SOUND = (
    "sound: {x}", "audio of {x}", "{x}, as a sound", "the sound of {x}", "{x} - can I hear that?",
    "an audio clip: {x}",
    "What does it sound like: {x}? Play it.", "I have never heard {x}. Play it.",
    "For my film I need the sound of {x}.",
    "Hello! Let me hear {x}.", "generate audio {x}", "pls play {x}", "My son wants to hear {x}.",
    "a recording of {x}, please",
    "Close your eyes and listen: {x}. Can you do that?", "Make some noise: {x}", "I want to know how it sounds: {x}.",
    "Surprise my ears with {x}!", "sound effect of {x}", "sound effect: {x}",
)  # fmt: skip
JOIN = (
    ("{0}, {1}", "{0}, and {1}", "{0} and then {1}", "{0}. Then {1}", "First {0}, after that {1}", "{0}, then {1}",
     "{0}. Also {1}", "{0}; {1}"),
    ("{0}, {1}, and {2}", "{0}, {1} and {2}", "{0}. {1}. {2}", "First {0}, then {1}, finally {2}",
     "{0}, then {1}, then {2}",
     "Three things: {0}; {1}; {2}"),
)  # fmt: skip
"""Requests in a row, two and three of them."""

NAME_CLIP = (
    "What is this?", "What do you see?", "What is in the video?", "What does the clip show?",
    "Name the thing in this film.",
    "Who or what moves here?", "What am I watching?", "Tell me what is in this video.", "what's in the clip", "",
)  # fmt: skip
DESCRIBE_CLIP = (
    "Describe this video.", "Describe the clip.", "What happens in this video?", "Give me a caption for this clip.",
    "Tell me what goes on here.", "Caption this video, please.", "Explain what you see in the film.",
)  # fmt: skip
ASK_MOTION = (
    "How does it move?",
    "What does it do?",
    "Which way does it go?",
    "What is the movement?",
    "how is it moving",
)
NAME_SOUND = (
    "What is this?", "What do you hear?", "What is that sound?", "What makes this sound?", "Name this sound.",
    "Which instrument or thing is this?", "What am I listening to?", "Tell me what you hear.", "what's that noise",
    "Do you recognise this sound?", "Who or what is making this noise?", "",
)  # fmt: skip
DESCRIBE_SOUND = (
    "Describe this sound.", "Describe what you hear.", "Give me a caption for this sound.",
    "What happens in this recording?",
    "Tell me everything about this sound.", "Caption this audio, please.", "Describe the recording in detail.",
)  # fmt: skip
AGAIN_CLIP = (
    "Make this again", "Film the same thing", "Make me another clip like this", "Animate this again",
    "Show me one like this",
    "Make a video like this", "Now you film it",
)  # fmt: skip
AGAIN_SOUND = (
    "Play this again", "Make the same sound", "Play me something like this", "Make a sound like this one",
    "Repeat this sound",
    "Now you play it",
)  # fmt: skip
CHANGE_MOTION = (
    "now {m}", "Make it {m}.", "The same, but {m}.", "Can I have it {m}?", "I want it {m}.", "and {m}?",
    "instead, {m}",
)  # fmt: skip
CHANGE_SOUND = (
    "now {x}", "Now play {x} instead.", "And now {x}?", "I would rather hear {x}.", "Change it to {x}.",
    "Make it {x}",
    "The same with {x}.", "How about {x}?",
)  # fmt: skip
INTO = {
    "image": (
        "Draw it", "Draw what you hear", "Draw what this is", "Show me a picture of that", "Now a picture of it",
        "Paint this",
        "Make a picture of it", "What does that look like? Draw it.", "Show me what makes this",
        "Turn this into a picture",
    ),
    "video": (
        "Make it move", "Animate this", "Make a video of it", "Film it", "Turn this into a clip",
        "Now a video of that",
        "Show it moving", "Bring it to life", "Make a clip of what this is",
    ),
    "audio": (
        "What does this sound like?", "Let me hear it", "Play its sound", "Make the sound of this",
        "And how does it sound?",
        "Now let me hear that", "Turn this into sound", "What would I hear?", "Play what you see",
    ),
}  # fmt: skip
"""Output modality -> requests to make it of what was shown or made before."""

# "a picture of a flat icon of a dog" reads badly: phrases that are pictures already take no second noun.
PICTURE_NOUNS = ("a picture", "a drawing", "an icon", "an image", "an illustration") + tuple(
    f"a {style} {noun}" for style in TRAINED_STYLES for noun in ("picture", "drawing", "icon", "image", "illustration")
)
