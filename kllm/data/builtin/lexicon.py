"""The things of the small world and their properties, each word in English and Chinese.

A row of a table is one thing; its columns are the facts about it. Words are "english/chinese".
"""

from __future__ import annotations

LANGS = ("en", "zh")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# A country: continent, capital, language.
COUNTRIES = """
France/法国 | Europe/欧洲 | Paris/巴黎 | French/法语
Germany/德国 | Europe/欧洲 | Berlin/柏林 | German/德语
Italy/意大利 | Europe/欧洲 | Rome/罗马 | Italian/意大利语
Spain/西班牙 | Europe/欧洲 | Madrid/马德里 | Spanish/西班牙语
Greece/希腊 | Europe/欧洲 | Athens/雅典 | Greek/希腊语
Russia/俄罗斯 | Europe/欧洲 | Moscow/莫斯科 | Russian/俄语
England/英国 | Europe/欧洲 | London/伦敦 | English/英语
China/中国 | Asia/亚洲 | Beijing/北京 | Chinese/汉语
Japan/日本 | Asia/亚洲 | Tokyo/东京 | Japanese/日语
Korea/韩国 | Asia/亚洲 | Seoul/首尔 | Korean/韩语
India/印度 | Asia/亚洲 | Delhi/德里 | Hindi/印地语
Thailand/泰国 | Asia/亚洲 | Bangkok/曼谷 | Thai/泰语
Egypt/埃及 | Africa/非洲 | Cairo/开罗 | Arabic/阿拉伯语
Kenya/肯尼亚 | Africa/非洲 | Nairobi/内罗毕 | Swahili/斯瓦希里语
Brazil/巴西 | America/美洲 | Brasilia/巴西利亚 | Portuguese/葡萄牙语
Cuba/古巴 | America/美洲 | Havana/哈瓦那 | Spanish/西班牙语
"""

# A city where people live: its country.
CITIES = """
Paris/巴黎 | France/法国
Lyon/里昂 | France/法国
Berlin/柏林 | Germany/德国
Munich/慕尼黑 | Germany/德国
Rome/罗马 | Italy/意大利
Milan/米兰 | Italy/意大利
Madrid/马德里 | Spain/西班牙
Athens/雅典 | Greece/希腊
Moscow/莫斯科 | Russia/俄罗斯
London/伦敦 | England/英国
Oxford/牛津 | England/英国
Beijing/北京 | China/中国
Shanghai/上海 | China/中国
Tokyo/东京 | Japan/日本
Osaka/大阪 | Japan/日本
Seoul/首尔 | Korea/韩国
Delhi/德里 | India/印度
Mumbai/孟买 | India/印度
Bangkok/曼谷 | Thailand/泰国
Cairo/开罗 | Egypt/埃及
Nairobi/内罗毕 | Kenya/肯尼亚
Havana/哈瓦那 | Cuba/古巴
"""

# A job: where it is done, what it needs.
JOBS = """
teacher/老师 | school/学校 | chalkboard/黑板
doctor/医生 | hospital/医院 | needle/针
baker/面包师 | bakery/面包店 | oven/烤箱
farmer/农民 | farm/农场 | tractor/拖拉机
waiter/服务员 | hotel/酒店 | tray/盘子
chef/厨师 | kitchen/厨房 | knife/刀
pilot/飞行员 | airport/机场 | plane/飞机
sailor/水手 | harbour/港口 | boat/船
painter/画家 | studio/画室 | brush/画笔
writer/作家 | library/图书馆 | pen/钢笔
actor/演员 | theatre/剧院 | mask/面具
judge/法官 | court/法院 | hammer/锤子
miner/矿工 | mine/矿山 | lamp/矿灯
gardener/园丁 | garden/花园 | spade/铲子
soldier/士兵 | camp/军营 | helmet/头盔
dentist/牙医 | clinic/诊所 | drill/钻头
singer/歌手 | stage/舞台 | microphone/话筒
butcher/屠夫 | market/市场 | axe/斧头
cleaner/清洁工 | office/办公室 | broom/扫帚
fireman/消防员 | fire station/消防站 | ladder/梯子
"""

# An animal: what kind it is, its legs, where it lives, what it eats, what covers it.
ANIMALS = """
cat/猫 | mammal/哺乳动物 | 4 | house/房子 | fish/鱼 | fur/毛
dog/狗 | mammal/哺乳动物 | 4 | yard/院子 | meat/肉 | fur/毛
rabbit/兔子 | mammal/哺乳动物 | 4 | hole/洞 | carrots/胡萝卜 | fur/毛
mouse/老鼠 | mammal/哺乳动物 | 4 | wall/墙 | cheese/奶酪 | fur/毛
monkey/猴子 | mammal/哺乳动物 | 2 | forest/森林 | bananas/香蕉 | fur/毛
panda/熊猫 | mammal/哺乳动物 | 4 | forest/森林 | bamboo/竹子 | fur/毛
fox/狐狸 | mammal/哺乳动物 | 4 | hole/洞 | hens/母鸡 | fur/毛
sheep/绵羊 | mammal/哺乳动物 | 4 | field/田野 | grass/草 | wool/羊毛
goat/山羊 | mammal/哺乳动物 | 4 | hill/山 | grass/草 | fur/毛
squirrel/松鼠 | mammal/哺乳动物 | 4 | tree/树 | nuts/坚果 | fur/毛
parrot/鹦鹉 | bird/鸟 | 2 | cage/笼子 | seeds/种子 | feathers/羽毛
pigeon/鸽子 | bird/鸟 | 2 | roof/屋顶 | bread/面包 | feathers/羽毛
duck/鸭子 | bird/鸟 | 2 | lake/湖 | worms/虫子 | feathers/羽毛
goose/鹅 | bird/鸟 | 2 | lake/湖 | grass/草 | feathers/羽毛
hen/母鸡 | bird/鸟 | 2 | yard/院子 | corn/玉米 | feathers/羽毛
owl/猫头鹰 | bird/鸟 | 2 | tree/树 | mice/老鼠 | feathers/羽毛
turtle/乌龟 | reptile/爬行动物 | 4 | river/河 | leaves/树叶 | shell/壳
lizard/蜥蜴 | reptile/爬行动物 | 4 | desert/沙漠 | flies/苍蝇 | scales/鳞片
frog/青蛙 | amphibian/两栖动物 | 4 | pond/池塘 | flies/苍蝇 | skin/皮
crab/螃蟹 | crustacean/甲壳动物 | 10 | beach/海滩 | shrimps/虾 | shell/壳
spider/蜘蛛 | arachnid/蛛形动物 | 8 | web/网 | flies/苍蝇 | hair/细毛
bee/蜜蜂 | insect/昆虫 | 6 | hive/蜂巢 | honey/蜂蜜 | hair/细毛
"""

# A food: what kind it is, its colour, its taste.
FOODS = """
apples/苹果 | fruit/水果 | red/红色 | sweet/甜
bananas/香蕉 | fruit/水果 | yellow/黄色 | sweet/甜
grapes/葡萄 | fruit/水果 | purple/紫色 | sweet/甜
lemons/柠檬 | fruit/水果 | yellow/黄色 | sour/酸
oranges/橙子 | fruit/水果 | orange/橙色 | sour/酸
carrots/胡萝卜 | vegetables/蔬菜 | orange/橙色 | sweet/甜
onions/洋葱 | vegetables/蔬菜 | purple/紫色 | hot/辣
peppers/辣椒 | vegetables/蔬菜 | red/红色 | hot/辣
beans/豆子 | vegetables/蔬菜 | green/绿色 | plain/淡
noodles/面条 | staples/主食 | white/白色 | plain/淡
rice/米饭 | staples/主食 | white/白色 | plain/淡
bread/面包 | staples/主食 | brown/棕色 | plain/淡
cheese/奶酪 | snacks/零食 | yellow/黄色 | salty/咸
chocolate/巧克力 | snacks/零食 | brown/棕色 | bitter/苦
honey/蜂蜜 | snacks/零食 | golden/金色 | sweet/甜
nuts/坚果 | snacks/零食 | brown/棕色 | salty/咸
"""

COLOURS = _words("""
    red/红色 blue/蓝色 green/绿色 yellow/黄色 black/黑色 white/白色 purple/紫色 orange/橙色 pink/粉色
    brown/棕色 grey/灰色 golden/金色""")
MONTHS = _words("""
    January/一月 February/二月 March/三月 April/四月 May/五月 June/六月 July/七月 August/八月
    September/九月 October/十月 November/十一月 December/十二月""")
